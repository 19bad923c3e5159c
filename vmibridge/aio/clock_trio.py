"""A clock of trio with virtual time. `MockClock` jumps over threads and sockets; this does not."""

import math
import time

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
        """Virtual seconds."""
        if self._since is not None:
            # The loop has slept: this is the first that it does after that.
            virtual = self.virtual
            virtual.pass_by(min(self._most, (_real() - self._since) * virtual.rate))
            self._since = None
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


def trio_time() -> VirtualTime | None:
    """That of the running loop, if it is virtual."""
    clock = trio.lowlevel.current_clock()
    return clock.virtual if isinstance(clock, TrioClock) else None
