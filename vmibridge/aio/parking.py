"""Where one task waits until another wakes it; an `Event` costs as much as the rest of a switch.

This one is for asyncio. `parking_trio` has the one for trio, `loops.parking` chooses.
"""

import asyncio
import math

_UVLOOP_TICK = 0.001
"""Seconds."""


class Parking:
    """Where one task at a time waits until another one wakes it. Made by `loops.parking`."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for `wake`. One that came before this does not count."""
        self._future = asyncio.get_running_loop().create_future()
        try:
            await self._future
        finally:
            self._future = None

    async def wait_for(self, seconds: float) -> None:
        """Wait for `wake`, and no longer than `seconds`, which may be infinite.

        By a timer of the loop: uvloop counts in milliseconds, and in the last of them a deadline of
        anyio 4.16 keeps it busy (`CancelScope._timeout` is called again until it has passed). There
        it waits for one millisecond at least.
        """
        if seconds == math.inf:
            await self.wait()
            return
        loop = asyncio.get_running_loop()
        if not isinstance(loop, asyncio.BaseEventLoop):
            seconds = max(seconds, _UVLOOP_TICK)
        timer = loop.call_later(seconds, self.wake)
        try:
            await self.wait()
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Let the task that waits go on; does nothing when there is none."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
