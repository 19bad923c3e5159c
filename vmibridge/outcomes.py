"""The way of the outcomes from the engines to whoever iterates over them.

Bounded: when the consumer lags behind, the lanes wait with their *next* traps; an
answer to a guest never waits for a consumer. Each engine has a way in of its own, so that
one that stops no longer waits while the others still do.
"""

from collections import deque
from typing import Any

import anyio

from vmibridge.outcome import Outcome


class OutcomeQueue:
    """One consumer, many producers, on one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: deque[Outcome[Any]] = deque()
        self._ways_in: list[OutcomesIn] = []
        self._arrived: anyio.Event | None = None
        self._ended = False
        self._error: BaseException | None = None

    def way_in(self) -> "OutcomesIn":
        """For one more producer."""
        way = OutcomesIn(self)
        self._ways_in.append(way)
        return way

    async def get(self) -> Outcome[Any]:
        """The next outcome. Raises `StopAsyncIteration` at the end, or the error it ended with."""
        while not self.items:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._arrived = anyio.Event()
            await self._arrived.wait()
        outcome = self.items.popleft()
        if len(self.items) == self.capacity // 2:
            for way in self._ways_in:
                way.free()
        return outcome

    def wake(self) -> None:
        """There is something to get."""
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    def end(self, error: BaseException | None = None) -> None:
        """No more will come; the consumer gets `error` after the last one."""
        self._ended = True
        self._error = error
        self.wake()


class OutcomesIn:
    """The way in of one producer."""

    def __init__(self, queue: OutcomeQueue) -> None:
        self._queue = queue
        self._room: anyio.Event | None = None
        self._bounded = True

    def put_nowait(self, outcome: Outcome[Any]) -> bool:
        """Whether there was room."""
        queue = self._queue
        if len(queue.items) >= queue.capacity and self._bounded:
            return False
        queue.items.append(outcome)
        queue.wake()
        return True

    async def put(self, outcome: Outcome[Any]) -> None:
        """Wait for room, which comes in batches of half the capacity."""
        while not self.put_nowait(outcome):
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    def unbind(self) -> None:
        """Hold any number from here on: at the end nobody may be left to read."""
        self._bounded = False
        self.free()

    def free(self) -> None:
        """There is room."""
        if self._room is not None:
            self._room.set()
            self._room = None
