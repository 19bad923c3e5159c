"""One QEMU with `ivshmem-doorbell`: what it is given, its doorbells, its end.

A ring is taken as a write to the doorbell of vfio-user that nobody waits for, so all behind it is
that of `Connection`. Nothing of the vfio-user protocol is sent or received.
"""

import mmap
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import anyio

from vmibridge.aio import sockets
from vmibridge.aio.loops import while_readable
from vmibridge.backends.device import ivshmem
from vmibridge.backends.device.connection import Connection
from vmibridge.backends.device.memory import GuestRanges
from vmibridge.backends.device.pending import Pending
from vmibridge.backends.device.slots import (
    DOORBELL_CALL,
    DOORBELL_CANCEL,
    Call,
    Limits,
    doorbell_offset,
)
from vmibridge.backends.device.stream import close_all
from vmibridge.backends.device.vfio_user import Access

__all__ = ["IvshmemConnection"]

_RING: Final = (1).to_bytes(4, "little")


class IvshmemConnection(Connection):
    """A QEMU that has connected. It owns the socket; `serve` is its life."""

    def __init__(
        self,
        connected: socket.socket,
        slots: int,
        kernel_slots: int,
        find_memory: Callable[[], GuestRanges],
        on_call: Callable[[Connection, Pending], None],
        on_abandoned: Callable[[Call], None],
    ) -> None:
        """As `Connection`. Raises `OSError` also if there are not enough descriptors.

        `find_memory` is called once, when a guest has rung: QEMU connects before it has memory.
        """
        super().__init__(connected, slots, Limits(), on_call, on_abandoned)
        self._is_stranger = False
        self._find_memory: Callable[[], GuestRanges] | None = find_memory
        self._memory = mmap.mmap(self.mailbox.descriptor, self.mailbox.size)
        self._doorbells: list[int] = []
        self._events: list[int] = []
        """The interrupts, which `_interrupts` owns."""
        # One descriptor to wait for, whatever the number of slots. Each ring is an event of its
        # own, so that no eventfd has to be read.
        self._rings = select.epoll()
        try:
            for _ in range(slots):
                self._doorbells.append(_eventfd())
                self._rings.register(self._doorbells[-1], select.EPOLLIN | select.EPOLLET)
            for slot in range(slots):
                self._events.append(_eventfd())
                self._interrupts.set(slot, 1, self._events[-1:])
        except BaseException:
            self._free()
            raise
        self._slot_of = {doorbell: slot for slot, doorbell in enumerate(self._doorbells)}
        # The header with what is so here.
        self.slots.limits = Limits(vectors=slots, kernel_slots=kernel_slots)
        self.slots.reset()

    async def serve(self) -> None:
        """Take rings until QEMU hangs up, or `end`. If cancelled, does as `end`.

        Raises `OSError` or `anyio.EndOfStream` at its end.
        """
        ended: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                try:
                    for message in ivshmem.greeting(
                        self.mailbox.descriptor, self._doorbells, self._events
                    ):
                        await self._send(message)
                    tasks.start_soon(while_readable, self._rings, self._take)
                    while True:
                        # It has nothing to say.
                        await sockets.receive(self.socket, 4096)
                except (anyio.EndOfStream, OSError) as error:
                    ended = error
                    # The end of one that has not read what it was sent.
                    self._is_stranger = isinstance(error, ConnectionError) and not self.used
                finally:
                    self.end()
                    tasks.cancel_scope.cancel()
        finally:
            self._deliver()
            self._free()
        if ended is not None:
            raise ended

    @property
    def is_qemu(self) -> bool:
        """Whether it has read the greeting, as far as is known, and did not only connect."""
        return not self._is_stranger

    async def _send(self, message: ivshmem.Message) -> None:
        passed = [] if message.descriptor is None else [message.descriptor]
        while True:
            try:
                socket.send_fds(self.socket, [message.data], passed)
            except BlockingIOError:
                await anyio.wait_writable(self.socket)
            else:
                return

    def _receive(self) -> bool:
        """Take what has rung, with the lock held. Returns whether something has."""
        rung = self._rings.poll(0)
        for doorbell, _ in rung:
            self._take_ring(self._slot_of[doorbell])
        return bool(rung)

    def _take_ring(self, slot: int) -> None:
        """Take a call, or that the guest has given one up; with the lock held."""
        if self._find_memory is not None:
            self.ranges, self._find_memory = self._find_memory(), None
        at = doorbell_offset(slot)
        self.access(Access(0, at + DOORBELL_CALL, 4, _RING, wants_reply=False))
        cancelled = self._memory[at + DOORBELL_CANCEL : at + DOORBELL_CANCEL + 4]
        self.access(Access(0, at + DOORBELL_CANCEL, 4, cancelled, wants_reply=False))

    def _free(self) -> None:
        self._rings.close()
        close_all(self._doorbells)
        self._memory.close()
        super()._free()


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
