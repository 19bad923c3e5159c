"""The guest memory of a replay: each request gets what was recorded of it (`request`)."""

import anyio

from vmibridge.errors import GuestMemoryError
from vmibridge.recording.messages import MemoryAccess
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.trap import TrapEvent

__all__ = ["ReplayedMemory"]

_MAX_HELD = 32 << 20
"""Bytes of memory accesses that may be held for requests that run."""


class ReplayedMemory:
    """That of one VM. `requests`: those that are open, by the numbers of their traps."""

    def __init__(self, walk: Walk, requests: dict[int, ReplayedRequest]) -> None:
        self.held: int = 0
        """Bytes of accesses that were not made yet."""
        self._walk = walk
        self._open = requests
        self._arrived = anyio.Event()

    async def read(self, event: TrapEvent, address: int, size: int) -> bytes:
        """The recorded bytes. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        while True:
            before = request.held
            try:
                data = request.take_read(address, size)
            finally:
                self.held -= before - request.held
            if data is not None:
                return data
            if request.over:
                return request.read_unrecorded(address, size)
            await self._further_accesses(request)

    async def write(self, event: TrapEvent, address: int, data: bytes) -> None:
        """As it went then. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        while True:
            before = request.held
            try:
                done = request.take_write(address, data)
            finally:
                self.held -= before - request.held
            if done:
                return
            if request.over:
                request.write_unrecorded(address, data)
                return
            await self._further_accesses(request)

    def attach(self, access: MemoryAccess) -> bool:
        """An access was read; returns whether there was room for it."""
        request = self._open.get(access.seq)
        if request is None:
            return True
        if request.answered:
            request.leave_out(access)
            return True
        if self.held > _MAX_HELD and not request.blocked:
            return False
        self.held += request.attach(access)
        if request.blocked:
            self.arrive()
        return True

    def _request_of(self, event: TrapEvent, address: int) -> ReplayedRequest:
        request = self._open.get(event.seq)
        if request is None:
            raise GuestMemoryError(address, "it is not in the recording")
        return request

    async def _further_accesses(self, request: ReplayedRequest) -> None:
        request.blocked = True
        arrived = self._arrived
        self._walk.go()
        if not arrived.is_set():
            await arrived.wait()

    def arrive(self) -> None:
        """More is known: who waits for an access looks again."""
        for request in dict.fromkeys(self._open.values()):
            request.blocked = False
        self._arrived.set()
        self._arrived = anyio.Event()
