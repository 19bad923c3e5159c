"""A clock of trio with virtual time. `MockClock` jumps over threads and sockets; this does not.

With it goes the order of what is ready. This takes what is not public: the dice `_r` of trio's
loop. `tests/unit/aio/test_virtual_time.py` fails if they go.
"""

import math
import random
import threading
import time
from collections.abc import MutableSequence
from typing import Any, Self

import trio
from trio.testing import active_thread_count

from vmibridge.aio.virtual_time import VirtualTime

_real = time.monotonic


class TrioClock(trio.abc.Clock):
    """See the module."""

    def __init__(self, virtual: VirtualTime) -> None:
        self.virtual: VirtualTime = virtual
        self._since: float | None = None
        self._most = 0.0

    def start_clock(self) -> None:
        """The loop begins."""
        self.virtual.next_timer = self._next_timer

    def current_time(self) -> float:
        """Virtual seconds, by the last bit later each time: of equal deadlines trio has them in any
        order."""
        if self._since is not None:
            # The loop has slept: this is the first that it does after that.
            virtual = self.virtual
            virtual.pass_by(min(self._most, (_real() - self._since) * virtual.rate))
            self._since = None
        if not self.virtual.is_held:
            self.virtual.now = math.nextafter(self.virtual.now, math.inf)
        return self.virtual.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """How long to sleep until something is ready; asked when no task can run."""
        timeout = deadline - self.current_time()
        if timeout <= 0 or timeout == math.inf:
            return timeout
        virtual = self.virtual
        if virtual.is_held:
            return math.inf
        if virtual.speed or self._is_busy():
            self._since, self._most = _real(), timeout
            return timeout / virtual.rate
        virtual.now = deadline
        return 0.0

    def _is_busy(self) -> bool:
        if active_thread_count():
            return True
        # One is the loop's own socket, by which threads and signals wake it.
        io = trio.lowlevel.current_statistics().io_statistics
        waiting = getattr(io, "tasks_waiting_read", 0) + getattr(io, "tasks_waiting_write", 0)
        return waiting > 1 and self.virtual.is_waited()

    def _next_timer(self) -> float:
        left = trio.lowlevel.current_statistics().seconds_to_next_deadline
        return self.virtual.now + left


class InTurn(trio.abc.Instrument):
    """Tasks that may run go on in the order in which they became ready, as on asyncio.

    Trio turns it round half of the time, by chance, so that nobody relies on it; then each replay
    of a changed handler would be another one. Other loops, in other threads, are left alone.
    """

    def before_run(self) -> None:
        """The loop begins, in this thread."""
        with _Dice.lock:
            dice = _of_trio()["_r"]
            if not isinstance(dice, _Dice):
                dice = _of_trio()["_r"] = _Dice(dice)
            dice.threads.add(threading.get_ident())

    def after_run(self) -> None:
        """It has ended."""
        with _Dice.lock:
            dice = _of_trio()["_r"]
            if isinstance(dice, _Dice):
                dice.threads.discard(threading.get_ident())
                if not dice.threads:
                    _of_trio()["_r"] = dice.before


class _Dice(random.Random):
    """The dice of trio, which are for that alone and for where its own clocks begin."""

    lock = threading.Lock()
    """Held while the dice of trio are changed for others."""

    def __new__(cls, *_: object) -> Self:
        """Without arguments, which are seeds."""
        return super().__new__(cls)

    def __init__(self, before: random.Random) -> None:
        super().__init__()
        self.before: random.Random = before
        self.threads: set[int] = set()
        """Those with loops in virtual time."""

    def random(self) -> float:
        """Below one half it turns round what it takes from the end."""
        return 0.0 if threading.get_ident() in self.threads else self.before.random()

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """In place of that, of what is in order, where Hypothesis is at work."""
        if threading.get_ident() in self.threads:
            x.reverse()
        else:
            self.before.shuffle(x)


def _of_trio() -> dict[str, Any]:
    """The names of the module in which trio's loop has its dice."""
    return vars(trio._core._run)  # noqa: SLF001 - no public name sets the order of tasks


def trio_time() -> VirtualTime | None:
    """That of the running loop, if it is virtual."""
    clock = trio.lowlevel.current_clock()
    return clock.virtual if isinstance(clock, TrioClock) else None
