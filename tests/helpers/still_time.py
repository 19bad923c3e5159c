"""Loops whose time stands still until a test lets it pass, on asyncio and on trio.

A deadline is met to the second, and nothing waits for a real one.
"""

import asyncio
import selectors
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

import anyio
import anyio.lowlevel
import trio
import trio.testing
from anyio.from_thread import BlockingPortal

# --- time that stands still ---------------------------------------------------------


class StillSelector(selectors.DefaultSelector):
    """Never waits for time; tells when the loop has nothing left to do."""

    quiet: asyncio.Future[None] | None = None

    def select(self, timeout=None):
        found = super().select(0)
        if found or timeout == 0:
            return found
        if self.quiet is not None:
            self.quiet.set_result(None)
            self.quiet = None
            return []
        return super().select(None)


class StillLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time is made up."""

    def __init__(self):
        self.now = 0.0
        self.selector = StillSelector()
        super().__init__(self.selector)

    def time(self):
        return self.now


class Asyncio:
    """asyncio, as the machine needs it."""

    name = "asyncio"

    @staticmethod
    def options() -> dict[str, Any]:
        return {"loop_factory": StillLoop}

    @staticmethod
    async def quiet() -> None:
        """Let every task run for as long as it can."""
        loop = asyncio.get_running_loop()
        loop.selector.quiet = loop.create_future()
        await loop.selector.quiet

    @staticmethod
    def advance(seconds: float) -> None:
        asyncio.get_running_loop().now += seconds


class Trio:
    """The same for trio."""

    name = "trio"

    @staticmethod
    def options() -> dict[str, Any]:
        return {"clock": trio.testing.MockClock()}

    @staticmethod
    async def quiet() -> None:
        await trio.testing.wait_all_tasks_blocked()

    @staticmethod
    def advance(seconds: float) -> None:
        trio.lowlevel.current_clock().jump(seconds)


LOOPS = (Asyncio, Trio)


def run_still(loop: type[Asyncio] | type[Trio], function, *args) -> Any:
    """Run it in such a loop."""
    return anyio.run(function, *args, backend=loop.name, backend_options=loop.options())


class LoopThread:
    """A loop in a thread of its own, and a way into it. One that hangs is left behind."""

    def __init__(self, loop: type[Asyncio] | type[Trio]):
        self._loop = loop
        self._portal: Future[BlockingPortal] = Future()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(BaseException):
            anyio.run(self._main, backend=self._loop.name, backend_options=self._loop.options())

    async def _main(self) -> None:
        async with BlockingPortal() as portal:
            self._portal.set_result(portal)
            await portal.sleep_until_stopped()

    def start(self, function, *args) -> Future[Any]:
        """Start a task in the loop."""
        return self._portal.result().start_task_soon(function, *args)

    def close(self) -> None:
        """End it; what is left there is cancelled."""
        with suppress(RuntimeError):
            self.start(self._portal.result().stop, True)
        self._thread.join(5)
