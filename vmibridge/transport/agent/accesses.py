"""Guest memory, accessed for a server: each write once, however often it is asked for.

A server that lost its connection asks again for what it has no reply to. A write that was
done, or is being done, is not done again: it gets the reply to the first one.
"""

from collections import OrderedDict
from collections.abc import Callable

from vmibridge.errors import GuestMemoryError, WireError
from vmibridge.transport.wire import (
    MAX_ACCESSES,
    MAX_LARGE_ACCESSES,
    SMALL_ACCESS,
    Memory,
    Read,
    Write,
)
from vmibridge.vm.backend import Backend
from vmibridge.vm.memory import MAX_ACCESS
from vmibridge.vm.trap import TrapEvent

_MAX_KEPT = MAX_ACCESSES + MAX_LARGE_ACCESSES
"""A server has no more accesses under way, and misses only the last replies."""
_ANSWERED = "the trap is answered: the guest runs again"


class Accesses:
    """The accesses of one agent."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._writes: OrderedDict[int, Memory | None] = OrderedDict()
        self._under_way = 0
        self._bytes = 0

    def forget(self) -> None:
        """Another incarnation of the server numbers its accesses from 1 again."""
        # A write that is under way keeps the table that it is in: its reply is kept there.
        self._writes = OrderedDict()

    async def do(
        self, frame: Read | Write, event: TrapEvent | None, post: Callable[[Memory], None]
    ) -> None:
        """Do it and reply. Without a trap that waits it fails.

        Raises `WireError` when a server has more under way than it may.
        """
        writes = self._writes
        if isinstance(frame, Write):
            if frame.access in writes:
                done = writes[frame.access]
                if done is not None:
                    post(done)
                return
            writes[frame.access] = None
        size = frame.size if isinstance(frame, Read) else len(frame.data)
        self._under_way += 1
        self._bytes += size
        try:
            # Twice: those of a lost connection may not have ended.
            if self._under_way > 2 * _MAX_KEPT or self._bytes > 2 * (
                MAX_ACCESSES * SMALL_ACCESS + MAX_LARGE_ACCESSES * MAX_ACCESS
            ):
                raise WireError("more accesses to memory at a time than were agreed")
            reply = await self._reply(frame, event)
        finally:
            self._under_way -= 1
            self._bytes -= size
        if isinstance(frame, Write) and frame.access in writes:
            writes[frame.access] = reply
            while len(writes) > 2 * _MAX_KEPT:
                writes.popitem(last=False)
        post(reply)

    async def _reply(self, frame: Read | Write, event: TrapEvent | None) -> Memory:
        if event is None:
            return Memory(frame.access, error=_ANSWERED)
        try:
            if isinstance(frame, Read):
                data = await self._backend.read_physical(event, frame.address, frame.size)
                return Memory(frame.access, bytes(data))
            await self._backend.write_physical(event, frame.address, frame.data)
        except GuestMemoryError as error:
            return Memory(frame.access, error=error.reason[:1000])
        except Exception as error:
            return Memory(frame.access, error=f"{type(error).__name__}: {error}"[:1000])
        return Memory(frame.access)
