"""The guest memory of a replay: each request gets what was recorded of it (`request`)."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.lowlevel

from vmibridge.errors import GuestMemoryError
from vmibridge.recording.messages import MemoryAccess
from vmibridge.recording.replay.open_requests import OpenRequests
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.trap import TrapEvent

__all__ = ["ReplayedMemory"]

R = TypeVar("R")

_MAX_HELD = 32 << 20
"""Bytes of memory accesses that may be held for requests that run."""


class ReplayedMemory:
    """That of one VM. `requests`: those that are open."""

    def __init__(self, walk: Walk, requests: OpenRequests) -> None:
        self.held: int = 0
        """Bytes of accesses that were not made yet."""
        self._walk = walk
        self._open = requests
        self._arrived = anyio.Event()

    async def read(self, event: TrapEvent, address: int, size: int) -> bytes:
        """The recorded bytes. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        data = await self._taken(request, partial(request.take_read, address, size))
        return request.read_unrecorded(address, size) if data is None else data

    async def write(self, event: TrapEvent, address: int, data: bytes) -> None:
        """As it went then. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        if await self._taken(request, partial(request.take_write, address, data)) is None:
            request.write_unrecorded(address, data)

    async def _taken(self, request: ReplayedRequest, take: Callable[[], R | None]) -> R | None:
        """What `take` finds among the recorded accesses; `None`: there is no such."""
        while True:
            before = request.held
            try:
                found = take()
            except GuestMemoryError:
                self._has_read(request)
                raise
            finally:
                self.held -= before - request.held
            if found is not None or request.over:
                self._has_read(request)
                return found
            await self._further_accesses(request)

    def attach(self, access: MemoryAccess) -> bool:
        """An access was read; returns whether there was room for it."""
        request = self._open.find(access.seq)
        if request is None:
            return True
        if request.answered:
            request.leave_out(access)
            return True
        if self.held > _MAX_HELD and not request.blocked:
            return False
        self.held += request.attach(access, self._walk.place())
        if request.blocked:
            self.arrive()
            # What the handler does next comes before what is recorded next.
            request.reads = True
            self._walk.wait_for(request, Awaited.READ)
        return True

    def _request_of(self, event: TrapEvent, address: int) -> ReplayedRequest:
        request = self._open.find(event.seq)
        if request is None:
            raise GuestMemoryError(address, "it is not in the recording")
        return request

    async def _further_accesses(self, request: ReplayedRequest) -> None:
        request.blocked, request.reads = True, False
        arrived = self._arrived
        self._walk.go()
        if not arrived.is_set():
            try:
                await arrived.wait()
                # One that is cut off meanwhile gets nothing any more. On trio it might.
                await anyio.lowlevel.checkpoint_if_cancelled()
            except BaseException:  # a cancellation: the walk must not wait for this read any more
                self._has_read(request)
                raise

    def _has_read(self, request: ReplayedRequest) -> None:
        """A handler that has waited for an access goes on."""
        if request.reads:
            request.reads = False
            self._walk.go()

    def arrive(self) -> None:
        """More is known: who waits for an access looks again."""
        for request in dict.fromkeys(self._open.by_seq.values()):
            request.blocked = False
        self._arrived.set()
        self._arrived = anyio.Event()
