"""Waiting for room in a sink of traps, for each kind of them: the engine's lanes and an agent's."""

from abc import ABC, abstractmethod

import anyio

from vmibridge.vm.trap import TrapEvent


class BoundedSink(ABC):
    """A `TrapSink` whose producers wait for room. Whoever derives from it wakes them.

    They are woken all at once, and the rest waits again: so it costs least to wake them in batches.
    """

    def __init__(self) -> None:
        self._room: anyio.Event | None = None
        """Set when there is room; `None` while no producer waits."""

    @abstractmethod
    def put_nowait(self, event: TrapEvent) -> None:
        """Raises `anyio.WouldBlock` when full, `TrapQueueClosedError` when closed."""

    async def put(self, event: TrapEvent) -> None:
        """Wait for room. Raises `TrapQueueClosedError`. If cancelled, nothing was put."""
        while True:
            try:
                return self.put_nowait(event)
            except anyio.WouldBlock:
                if self._room is None:
                    self._room = anyio.Event()
                await self._room.wait()

    def _wake_producers(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
