"""A QEMU as the device sees it: the messages that it sends, byte by byte."""

import mmap
import os
import socket
import struct

from vmibridge.backends.device import slots
from vmibridge.backends.device import vfio_user as protocol
from vmibridge.backends.device.vfio_user import ACCESS, DMA_MAP, DMA_UNMAP, HEADER

CAPABILITIES = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}\0'


def message(command, body=b"", *, number=1, flags=0, error=0, size=None):
    """One message; `size` in place of the right one."""
    whole = HEADER.size + len(body) if size is None else size
    return HEADER.pack(number, command, whole, flags, error) + body


def version(body=CAPABILITIES, major=0, minor=0, **given):
    return message(protocol.VERSION, struct.pack("<HH", major, minor) + body, **given)


def write(offset, data, region=0, **given):
    return message(protocol.WRITE, ACCESS.pack(offset, region, len(data)) + data, **given)


def read(offset, size, region=0, **given):
    return message(protocol.READ, ACCESS.pack(offset, region, size), **given)


def dma_map(address, size, offset=0, flags=3, **given):
    body = DMA_MAP.pack(DMA_MAP.size, flags, offset, address, size)
    return message(protocol.MAP, body, **given)


def dma_unmap(address, size, flags=0, **given):
    body = DMA_UNMAP.pack(DMA_UNMAP.size, flags, address, size)
    return message(protocol.UNMAP, body, **given)


def set_irqs(index, flags, start, count, **given):
    body = struct.pack("<5I", 20, flags, index, start, count)
    return message(protocol.SET_IRQS, body, **given)


def region_info(index, argsz=4096, **given):
    return message(protocol.GET_REGION, struct.pack("<4I2Q", argsz, 0, index, 0, 0, 0), **given)


def irq_info(index, **given):
    return message(protocol.GET_IRQ, struct.pack("<4I", 16, 0, index, 0), **given)


class Reply:
    """A message that came back."""

    def __init__(self, data):
        self.number, self.command, size, self.flags, self.error = HEADER.unpack_from(data)
        assert size == len(data)
        self.body = data[HEADER.size :]


class Client:
    """A QEMU with a guest: a socket, and the slots mapped. Nothing of it waits long."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.ask(version())
        self.socket.sendall(region_info(0))
        data, (descriptor,), _, _ = socket.recv_fds(self.socket, 65536, 1)
        self.size = struct.unpack_from("<4I2Q", data, HEADER.size)[4]
        self.memory = mmap.mmap(descriptor, self.size)
        os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.memory.close()
        self.socket.close()

    def send(self, data, descriptors=()):
        if descriptors:
            socket.send_fds(self.socket, [data], descriptors)
        else:
            self.socket.sendall(data)

    def receive(self):
        """The next message."""
        head = self._exactly(HEADER.size)
        return Reply(head + self._exactly(HEADER.unpack(head)[2] - HEADER.size))

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            some = self.socket.recv(size - len(data))
            if not some:
                raise EOFError
            data += some
        return data

    def ask(self, data, descriptors=()):
        self.send(data, descriptors)
        return self.receive()

    def fill(self, slot=0, number=1, *, space=0, flags=0, magic=0x42494D56, state=1):
        call = (magic, 7, 2, 11, 12, 13, 14, state, flags, space, number, 0)
        slots.CALL.pack_into(self.memory, slots.slot_offset(slot), *call)

    def ring(self, slot=0, number=1, *, message_number=100, **given):
        """Fill a slot and ring, without waiting for the reply."""
        self.fill(slot, number, **given)
        self.send(write(slots.doorbell_offset(slot), b"\1\0\0\0", number=message_number))

    def word(self, offset, slot=0):
        return struct.unpack_from("<I", self.memory, slots.slot_offset(slot) + offset)[0]

    def state(self, slot=0):
        return self.word(slots.STATE_AT, slot)

    @property
    def generation(self):
        return struct.unpack_from("<9I", self.memory)[8]
