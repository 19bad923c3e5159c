"""The way of the outcomes from the workers to whoever iterates over them.

Bounded: when the consumer lags behind, the lanes wait with their *next* traps; an
answer to a guest never waits for a consumer.
"""

from collections import deque
from typing import Any

import anyio

from vmibridge.outcome import Outcome


class OutcomeQueue:
    """One consumer, many producers, on one event loop."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[Outcome[Any]] = deque()
        self._arrived: anyio.Event | None = None
        self._room: anyio.Event | None = None
        self._bounded = True
        self._ended = False
        self._error: BaseException | None = None

    def put_nowait(self, outcome: Outcome[Any]) -> bool:
        """Whether there was room."""
        if len(self._items) >= self._capacity and self._bounded:
            return False
        self._items.append(outcome)
        self._wake()
        return True

    async def put(self, outcome: Outcome[Any]) -> None:
        """Wait for room, which comes in batches of half the capacity."""
        while not self.put_nowait(outcome):
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    async def get(self) -> Outcome[Any]:
        """The next outcome. Raises `StopAsyncIteration` at the end, or the error it ended with."""
        while not self._items:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._arrived = anyio.Event()
            await self._arrived.wait()
        outcome = self._items.popleft()
        if self._room is not None and len(self._items) <= self._capacity // 2:
            self._free()
        return outcome

    def unbind(self) -> None:
        """Hold any number from here on: at the end nobody may be left to read."""
        self._bounded = False
        self._free()

    def end(self, error: BaseException | None = None) -> None:
        """No more will come; the consumer gets `error` after the last one."""
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    def _free(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
