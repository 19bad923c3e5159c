"""A QEMU as the device sees it: the messages that it sends, byte by byte."""

import struct

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
