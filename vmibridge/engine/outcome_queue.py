"""The queue of outcomes from the engines to the consumer that iterates over them.

Bounded: when the consumer lags behind, the lanes wait with their *next* traps; an
answer to a guest never waits for a consumer. Each engine is a producer of its own, so that
one that stops no longer waits while the others still do.

Where outcomes come one by one and close together, a consumer that is woken for each costs as
much as an answer. So one that was woken a moment ago lets a few gather, unless a producer
waits for it.
"""

import math
from collections import deque
from typing import Any

import anyio

from vmibridge.aio.loops import parking
from vmibridge.aio.parking import Parking
from vmibridge.bridge.outcome import Outcome

_DENSE = 0.001
"""Seconds."""


class OutcomeQueue:
    """One consumer, many producers, on one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: deque[Outcome[Any]] = deque()
        self._producers: list[OutcomeProducer] = []
        self._arrived: Parking | None = None
        self._gathering: Parking | None = None
        self._woken = -math.inf
        self._ended = False
        self._error: BaseException | None = None

    def add_producer(self) -> "OutcomeProducer":
        """For one more producer."""
        producer = OutcomeProducer(self)
        self._producers.append(producer)
        return producer

    async def get(self) -> Outcome[Any]:
        """The next outcome. Raises `StopAsyncIteration` at the end, or the error it ended with."""
        while not self.items:
            if self._ended:
                error, self._error = self._error, None
                raise StopAsyncIteration if error is None else error
            if self._arrived is None:
                self._arrived = parking()
            await self._arrived.wait()
            if anyio.current_time() < self._woken + _DENSE and not self._ended:
                await self._gather()
            self._woken = anyio.current_time()
        return self.take()

    def take(self) -> Outcome[Any]:
        """The next outcome, where `items` has one."""
        outcome = self.items.popleft()
        # Outcomes go one by one, so each way down passes this number, once.
        if len(self.items) == self.capacity // 2:
            for producer in self._producers:
                producer.free()
        return outcome

    async def _gather(self) -> None:
        # A full queue has producers that wait, and behind them vCPUs: nothing more could gather.
        if len(self.items) < self.capacity:
            self._gathering = parking()
            await self._gathering.wait_for(_DENSE)

    def wake(self) -> None:
        """There is something to get."""
        if self._arrived is not None:
            self._arrived.wake()

    def hurry(self) -> None:
        """A producer waits for the consumer."""
        if self._gathering is not None:
            self._gathering.wake()

    def end(self, error: BaseException | None = None) -> None:
        """No more will come; the consumer gets `error` after the last one."""
        self._ended = True
        self._error = error
        self.wake()
        self.hurry()


class OutcomeProducer:
    """One producer: what an engine puts outcomes in by."""

    def __init__(self, queue: OutcomeQueue) -> None:
        self._queue = queue
        self._room: anyio.Event | None = None
        self._bounded = True

    def put_nowait(self, outcome: Outcome[Any]) -> bool:
        """Whether there was room."""
        queue = self._queue
        items = queue.items
        if len(items) >= queue.capacity and self._bounded:
            return False
        items.append(outcome)
        # The consumer waits only while there is nothing, so it was woken for the first of these.
        if len(items) == 1:
            queue.wake()
        return True

    async def put(self, outcome: Outcome[Any]) -> None:
        """Wait for room, which comes in batches of half the capacity."""
        while not self.put_nowait(outcome):
            # The consumer may be in `_gather`, which would hold this vCPU for nothing.
            self._queue.hurry()
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    def unbind(self) -> None:
        """Hold any number from here on: at the end the consumer may have gone."""
        self._bounded = False
        self.free()

    def free(self) -> None:
        """There is room."""
        if self._room is not None:
            self._room.set()
            self._room = None
