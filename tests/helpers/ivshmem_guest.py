"""A guest of the ivshmem backend without a VM: it takes the greeting as QEMU does, and calls."""

import mmap
import os
import socket
import struct
from contextlib import asynccontextmanager

import anyio

from vmibridge.backends.device.slots import (
    CALL,
    DOORBELL_CANCEL,
    HEADER,
    MAGIC,
    SPACE_SLOT,
    STATE_AT,
    STATE_CALLED,
    STATE_TAKEN,
    doorbell_offset,
    slot_offset,
)

NUMBER, WORD = struct.Struct("<q"), struct.Struct("<I")


class IvshmemGuest:
    """What a device has after the greeting. `doorbells` and `interrupts` are eventfds by slot."""

    def __init__(self, numbers, descriptors):
        self.numbers = numbers
        """Of the messages, in their order."""
        memory, *events = descriptors
        self.doorbells, self.interrupts = events[: len(events) // 2], events[len(events) // 2 :]
        self.memory = mmap.mmap(memory, os.fstat(memory).st_size)
        self._descriptors = descriptors
        self._calls = 0

    def header(self):
        return HEADER.unpack_from(self.memory, 0)

    def write(self, slot, request, method=1, values=(0, 0, 0, 0), flags=0, space=SPACE_SLOT):
        """Put a call into a slot; returns its number."""
        self._calls += 1
        CALL.pack_into(
            self.memory, slot_offset(slot), MAGIC, request, method, *values,
            STATE_CALLED, flags, space, self._calls, 0,
        )  # fmt: skip
        return self._calls

    def ring(self, slot):
        os.eventfd_write(self.doorbells[slot], 1)

    def cancel(self, slot, number):
        WORD.pack_into(self.memory, doorbell_offset(slot) + DOORBELL_CANCEL, number)
        self.ring(slot)

    def state(self, slot):
        return WORD.unpack_from(self.memory, slot_offset(slot) + STATE_AT)[0]

    def call_in(self, slot):
        """The fields of a slot, by `CALL`."""
        return CALL.unpack_from(self.memory, slot_offset(slot))

    async def reaches(self, slot, *states):
        """Wait until a slot has one of these states."""
        while self.state(slot) not in states:
            await anyio.sleep(0.001)
        return self.state(slot)

    async def call(self, slot, request, *rest, **named):
        """Call, and wait: the state and the values of the answer."""
        self.write(slot, request, *rest, **named)
        self.ring(slot)
        while self.state(slot) in (STATE_CALLED, STATE_TAKEN):
            await anyio.sleep(0.001)
        return self.state(slot), self.call_in(slot)[3:7]

    def close(self):
        self.memory.close()
        for each in self._descriptors:
            os.close(each)


@asynccontextmanager
async def ivshmem_guest(path, slots):
    """A guest in a block, at whose end its VM has ended."""
    with socket.socket(socket.AF_UNIX) as device:
        device.setblocking(False)
        device.connect(str(path))
        numbers, descriptors = [], []
        while len(descriptors) < 1 + 2 * slots:
            await anyio.wait_readable(device)
            # One message each, as QEMU reads them.
            data, passed, _, _ = socket.recv_fds(device, NUMBER.size, 1)
            assert len(data) == NUMBER.size, "the server has hung up"
            numbers.append(NUMBER.unpack(data)[0])
            descriptors += passed
        guest = IvshmemGuest(numbers, descriptors)
        try:
            yield guest
        finally:
            guest.close()
