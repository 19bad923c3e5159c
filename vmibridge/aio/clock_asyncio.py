"""A loop of asyncio with virtual time.

What is real is seen so: a thread of anyio that is not idle, a call in an executor, a child that is
waited for, a file descriptor that the loop watches. This takes what is not public: `_scheduled` and
`_clock_resolution` of the loop, `WorkerThread` of anyio. `tests/unit/aio/test_virtual_time.py`
fails if one goes.
"""

import asyncio
import math
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from anyio._backends._asyncio import WorkerThread

from vmibridge.aio.virtual_time import VirtualTime

_real = time.monotonic


class VirtualSelector(selectors.DefaultSelector):
    """Waits for time by letting it jump."""

    def __init__(self, loop: "VirtualLoop", virtual: VirtualTime) -> None:
        super().__init__()
        self._loop = loop
        self._virtual = virtual

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready. `timeout`: seconds of virtual time; `None`: no timer is set."""
        if timeout is None:
            return super().select(None)
        found = super().select(0)
        if found or timeout <= 0:
            return found
        virtual = self._virtual
        if virtual.is_held:
            # Who holds it waits for a thread, which wakes the loop.
            return super().select(None)
        if virtual.speed or self._is_busy():
            before = _real()
            found = super().select(timeout / virtual.rate)
            if not found and not self._is_busy():
                virtual.pass_by(timeout)
            else:
                virtual.pass_by(min(timeout, (_real() - before) * virtual.rate))
            return found
        virtual.pass_by(timeout)
        return found

    def _is_busy(self) -> bool:
        """Whether something real is under way."""
        # One is the loop's own pipe, by which threads and signals wake it.
        if self._loop.executing or (len(self.get_map()) > 1 and self._virtual.is_waited()):
            return True
        for thread in threading.enumerate():
            if isinstance(thread, WorkerThread):
                if thread.loop is self._loop and thread not in thread.idle_workers:
                    return True
            elif "waitpid-" in thread.name:
                return True
        return False


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self, virtual: VirtualTime) -> None:
        self.virtual: VirtualTime = virtual
        self.executing: int = 0
        """Calls in executors."""
        super().__init__(VirtualSelector(self, virtual))
        self._scheduled: list[asyncio.TimerHandle]
        # No timer goes off a nanosecond before its time: anyio would put off a deadline then, and a
        # sleep of the same length came first.
        self._clock_resolution = 0.0
        virtual.next_timer = self._next_timer

    def time(self) -> float:
        """Virtual seconds, by the last bit later each time: timers that are set one after another
        are due in that order, as on any loop. Of equal times asyncio has them in any order."""
        virtual = self.virtual
        if not virtual.is_held:
            virtual.now = math.nextafter(virtual.now, math.inf)
        return virtual.now

    # The stubs of the standard library type its arguments together, which a call through cannot.
    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """As any loop, and count it."""
        future = super().run_in_executor(executor, func, *args)
        self.executing += 1
        future.add_done_callback(self._executed)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        """As any loop: since Python 3.12 in so many seconds, which are not to be jumped over."""
        self.executing += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.executing -= 1

    def _executed(self, _: object) -> None:
        self.executing -= 1

    def _next_timer(self) -> float:
        return self._scheduled[0].when() if self._scheduled else float("inf")


def asyncio_time() -> VirtualTime | None:
    """That of the running loop, if it is virtual."""
    loop = asyncio.get_running_loop()
    return loop.virtual if isinstance(loop, VirtualLoop) else None
