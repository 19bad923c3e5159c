"""The times of a recording, by the clock of the loop on which it is replayed.

The first message has the time of now. On a loop with `VirtualTime` all others have theirs then;
else they matter with a `speed` only, which real time is divided by.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from vmibridge.aio.clock import VirtualTime, loop_clock, virtual_time

__all__ = ["RecordedTime"]

_TINY = 1e-9


class RecordedTime:
    """That of one walk. Recorded times are in nanoseconds, those of the clock in seconds."""

    def __init__(self, speed: float) -> None:
        """`speed` is that of `ReplayOptions`."""
        self.now: Callable[[], float] = time.monotonic
        """The clock of the loop."""
        self.is_timed: bool = bool(speed)
        """Whether something may have to wait for its time."""
        self._speed = speed
        self._virtual: VirtualTime | None = None
        self._start: tuple[float, int] | None = None

    def join(self, is_waited: Callable[[], bool]) -> None:
        """The replay runs on the running loop. `is_waited`: whether handlers run."""
        self._virtual, self.now = virtual_time(), loop_clock()
        if self._virtual is not None:
            self.is_timed = True
            self._virtual.is_waited = is_waited

    @property
    def is_virtual(self) -> bool:
        """Whether the time of the loop is that of the recording."""
        return self._virtual is not None

    def held(self) -> AbstractContextManager[None]:
        """Virtual time does not pass in the block."""
        return nullcontext() if self._virtual is None else self._virtual.held()

    def pass_by(self, seconds: float) -> None:
        """So much virtual time passes."""
        if self._virtual is not None:
            self._virtual.pass_by(seconds)

    def due(self, at: int, *, jumps: bool) -> float | None:
        """When by the clock that happens which was recorded at `at`; `None`: it may happen now.

        `jumps`: virtual time jumps there.
        """
        virtual = self._virtual
        if virtual is None and not self._speed:
            return None
        now = self.now()
        if self._start is None:
            self._start = (now, at)
        since, first = self._start
        due = since + (at - first) / 1e9 / (self._speed if virtual is None else 1.0)
        if due <= now + _TINY or (jumps and virtual is not None and virtual.jump(due)):
            return None
        return due

    def recorded(self, clock: float) -> int | None:
        """What was recorded at a time of the clock; `None`: time is not that of the recording."""
        if self._virtual is None or self._start is None:
            return None
        since, first = self._start
        return first + round((clock - since) * 1e9)

    def recorded_now(self) -> int | None:
        """The same of this moment."""
        return self.recorded(self.now())

    def mark(self, at: int) -> tuple[float, int] | None:
        """This moment and a recorded time, for `as_late`; `None`: virtual time needs none."""
        return None if self._virtual is not None else (self.now(), at)

    def as_late(self, since: tuple[float, int] | None, at: int) -> float | None:
        """When by the clock as much time has passed since a mark as then, until `at`; `None`: it
        has, or the times do not matter."""
        if self._virtual is not None or self._speed or since is None:
            return None
        now, then = since
        due = now + (at - then) / 1e9
        return None if due <= self.now() else due
