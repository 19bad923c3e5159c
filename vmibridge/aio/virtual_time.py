"""Time that a loop can let jump; see `clock`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["VirtualTime"]

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
