"""The least that answers a guest of the device: one blocking loop over QEMU's socket.

No lanes, no handlers, no deadlines, and no care for what a guest might do wrong. The messages at
the start are answered by the protocol of the backend; a ring of the doorbell by the loop itself.
"""

import array
import mmap
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common import ALL_RIGHT, MASK64, Figures, Stopwatch

from vmibridge.backends.device import slots, vfio_user
from vmibridge.backends.device.stream import close_all
from vmibridge.backends.device.vfio_user import ACCESS, HEADER, REPLY, Access, Bar, DmaMap, VfioUser
from vmibridge.bridge.contract import STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

RING = HEADER.size + ACCESS.size + 4
"""Bytes of the message of a doorbell."""
VALUES, STATE = struct.Struct("<4Q"), struct.Struct("<I")
STAMPS = STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4


class Start(vfio_user.Host):
    """What QEMU asks before its guest calls: nothing of it is of use here."""

    protocol: VfioUser

    def access(self, access: Access) -> None:
        self.protocol.reply(access, bytes(access.size))

    def map(self, mapping: DmaMap, descriptor: int | None) -> int:
        self.drop([] if descriptor is None else [descriptor])
        return 0

    def unmap(self, address: int, size: int) -> int:
        return 0

    def unmap_all(self) -> None:
        pass

    def set_interrupts(self, first: int, count: int, descriptors: Sequence[int]) -> None:
        self.drop(descriptors)

    def reset(self) -> None:
        pass

    def transferred(self, transfer: int, data: bytes | None) -> None:
        pass

    def drop(self, descriptors: Sequence[int]) -> None:
        close_all(descriptors)


def bare(path: Path, command: list[str], calls: int) -> Figures:
    """Serve a guest that has to end well, and calls by slot 0."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with subprocess.Popen(command) as qemu:
            watch = Stopwatch(calls, qemu.pid)
            try:
                peer, _ = listener.accept()
                with peer:
                    serve(peer, watch)
            except BaseException:  # Ctrl-C, too: nobody else would end it
                qemu.kill()
                raise
            assert qemu.wait() == ALL_RIGHT
    path.unlink()
    return watch.figures


def serve(peer: socket.socket, watch: Stopwatch) -> None:
    """Answer what comes until QEMU hangs up."""
    size = slots.memory_size(1)
    shared = os.memfd_create("slots")
    os.ftruncate(shared, size)
    memory = memoryview(mmap.mmap(shared, size))
    start = Start()
    protocol = start.protocol = VfioUser(start, Bar(size, shared, slots.shared_areas(1)))
    doorbell, slot = slots.doorbell_offset(0), slots.slot_offset(0)
    room = socket.CMSG_SPACE(4 * vfio_user.MAX_DESCRIPTORS)
    while True:
        try:
            data, control, _, _ = peer.recvmsg(1 << 16, room)
        except ConnectionResetError:
            data = b""
        if not data:
            break
        if len(data) == RING:
            number, command, *_ = HEADER.unpack_from(data)
            where = ACCESS.unpack_from(data, HEADER.size)
            if command == vfio_user.WRITE and where[:2] == (doorbell, 0):
                _, _, _, value1, value2, *_, call, _ = slots.CALL.unpack_from(memory, slot)
                VALUES.pack_into(memory, slot + slots.VALUES_AT, ~value1 & MASK64, value2, *STAMPS)
                STATE.pack_into(memory, slot + slots.ANSWERED_AT, call)
                STATE.pack_into(memory, slot + slots.STATE_AT, slots.STATE_ANSWERED)
                size = HEADER.size + ACCESS.size
                peer.sendall(HEADER.pack(number, command, size, REPLY, 0) + ACCESS.pack(*where))
                watch.see()
                continue
        passed = array.array("i")
        for _, _, each in control:
            passed.frombytes(each)
        protocol.receive(data, passed.tolist())
        while protocol.out:
            message, descriptors = protocol.out.popleft()
            socket.send_fds(peer, [message], descriptors)
    os.close(shared)
