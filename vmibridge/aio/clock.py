"""The clock of a server, and loops whose time is virtual.

Everything that the engine times, deadlines, results, quotas, durations, is read off one clock:
`loop_clock`. On an ordinary loop that is the monotonic clock of the machine. A replay runs on a
loop with a `VirtualTime`: when nothing can run before the next timer is due, time jumps there. So
an hour that a handler slept takes no time.

| the loop is idle, and | time |
|---|---|
| nothing real is waited for | jumps to the next timer; with a `speed` it takes the N-th part |
| a thread works, or a socket or a pipe is waited for | passes as it does outside |
| the replay reads its file (`held`) | stands still |

Time does not pass while code runs, but for the last bit of it. uvloop has a clock of its own, in C:
no virtual time there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sniffio import current_async_library

__all__ = ["VirtualTime", "loop_clock", "virtual_loop", "virtual_time"]

_real = time.monotonic


class VirtualTime:
    """The time of one loop."""

    def __init__(self, speed: float = 0.0) -> None:
        """`speed`: how many times as fast as real time it passes; 0: without waiting."""
        self.speed: float = speed
        self.now: float = _real()
        """Seconds; it begins with the monotonic clock, and never goes back."""
        self.is_waited: Callable[[], bool] = _always
        """Whether anyone may wait for the sockets that are open. What keeps connections between
        requests would make time pass as it does outside all the time."""
        self.next_timer: Callable[[], float] = _never
        """When the next timer of the loop is due; set by the loop."""
        self._held = 0

    def read(self) -> float:
        """Seconds, now."""
        return self.now

    @property
    def is_held(self) -> bool:
        """Whether it stands still."""
        return self._held > 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """It stands still for the block, in which something outside of the replay is awaited."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def jump(self, until: float) -> bool:
        """Go on to `until` at once, if no timer is due before and none has to be waited for.

        For who knows that no task has anything left to do before.
        """
        if self.speed or self.next_timer() < until:
            return False
        self.now = max(self.now, until)
        return True

    def pass_by(self, seconds: float) -> None:
        """So much of it has passed."""
        self.now += max(seconds, 0.0)

    @property
    def rate(self) -> float:
        """How many times as fast as real time it passes while something real is waited for."""
        return self.speed or 1.0


def _always() -> bool:
    return True


def _never() -> float:
    return float("-inf")


def virtual_time() -> VirtualTime | None:
    """That of the running loop; `None`: its time is real."""
    if current_async_library() == "trio":
        from vmibridge.aio.clock_trio import trio_time

        return trio_time()
    from vmibridge.aio.clock_asyncio import asyncio_time

    return asyncio_time()


def loop_clock() -> Callable[[], float]:
    """The clock of a server on the running loop: a function that returns seconds."""
    virtual = virtual_time()
    return _real if virtual is None else virtual.read


def virtual_loop(loop: str, virtual: VirtualTime) -> tuple[str, dict[str, Any]]:
    """The backend and its options by which `anyio.run` makes a loop of that time.

    `loop` is `asyncio` or `trio`. Raises `ValueError` for others.
    """
    if loop == "trio":
        from vmibridge.aio.clock_trio import TrioClock

        return "trio", {"clock": TrioClock(virtual)}
    if loop != "asyncio":
        raise ValueError(f"{loop} has no virtual time")
    from vmibridge.aio.clock_asyncio import VirtualLoop

    return "asyncio", {"loop_factory": lambda: VirtualLoop(virtual)}
