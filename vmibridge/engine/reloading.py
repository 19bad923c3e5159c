"""Handlers that take the place of others while the guest runs.

Theory of operation
===================

An engine has one bridge, and asks it at each trap. `Engine.reload` has the new handlers entered,
gives the engine their bridge in one step, and has those of before left when none of them runs.
A request stays with the handlers that it was begun by: they were looked up when its trap was taken.
So no trap is dropped, none is asked of two handlers, and no trap pays anything for this.

Invariants:

- New handlers are entered before they are asked, in a task of their own. Where one cannot be
  entered, those of before go on.
- Handlers are left when no handler of theirs runs, or at the end, after the last answer. The
  first ones, which are entered with the engine, are left at its end.
- A handler that the new bridge has, too, is neither entered again nor left.
"""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.handler_lives import Lives
from vmibridge.engine.request import DONE_BY_WORKER
from vmibridge.errors import HandlerLifeError

if TYPE_CHECKING:
    from vmibridge.engine.engine import Engine
    from vmibridge.engine.request import Worker

__all__ = ["LaterHandlers", "StillRunning", "reload_each"]

log: logging.Logger = logging.getLogger(__name__)

_LOOKS = 0.05
"""Seconds between two looks for whether a handler still runs: nothing is paid for it elsewhere."""
_ENTERED_WITHIN = 30.0
"""Seconds that new handlers may take to be entered."""


class StillRunning:
    """The handlers that run while others take their place.

    Between two `await`s nothing else runs, so each has a worker that is not done with its request.
    """

    def __init__(self, workers: "set[Worker]") -> None:
        """`workers`: all that there are, now and later."""
        self._workers = workers
        # By the context, which each request has anew: the worker may be at another one by then.
        self._left: list[tuple[Worker, BridgeContext]] = [
            (worker, worker.context)
            for worker in workers
            if worker.request.state not in DONE_BY_WORKER
        ]

    def __bool__(self) -> bool:
        """Whether one still runs, or unwinds."""
        self._left = [
            (worker, context)
            for worker, context in self._left
            if worker in self._workers
            and worker.context is context
            and worker.request.state not in DONE_BY_WORKER
        ]
        return bool(self._left)

    async def ended(self) -> None:
        """Wait until none does."""
        while self:  # noqa: ASYNC110 - no trap is to pay for an event
            await anyio.sleep(_LOOKS)


async def reload_each(
    engines: "Mapping[str, Engine]", bridges: Iterable[Bridge]
) -> tuple[list[StillRunning], list[str]]:
    """Give each engine its bridge. Returns what still runs of those that have it, and the names of
    those that keep theirs, with a line in the log; one that ends does neither."""
    left: list[StillRunning] = []
    kept: list[str] = []
    for (vm, engine), bridge in zip(engines.items(), bridges, strict=True):
        try:
            running = await engine.reload(bridge)
        except HandlerLifeError as error:
            log.error("vm %s: keeps its current handlers: %s", vm, error)  # noqa: TRY400
            kept.append(vm)
            continue
        left += [] if running is None else [running]
    return left, kept


class _Life:
    """Handlers that were entered together."""

    def __init__(self, handlers: list[BridgeHandler[Any]], stop_timeout: float) -> None:
        self.handlers = handlers
        self.lives = Lives(handlers, stop_timeout)
        self.entered = anyio.Event()
        """Or failed, which `error` tells."""
        self.error: Exception | None = None
        self.leave = anyio.Event()


class LaterHandlers:
    """The lives of handlers that were reloaded. `fail` is told when one ends by itself."""

    def __init__(self, stop_timeout: float, fail: Callable[[Exception], None]) -> None:
        self._stop_timeout = stop_timeout
        self._fail = fail
        self._lives: list[_Life] = []
        self._stops = False
        self._opened = anyio.Event()
        self._tasks: TaskGroup | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Handlers can be entered in the block, and are left behind it at the latest."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._opened.set()
            try:
                yield
            finally:
                self._tasks = None
                self.stop(0)
                for life in self._lives:
                    life.leave.set()

    def stop(self, grace: float) -> None:
        """As that of `Lives`."""
        self._stops = True
        self._opened.set()
        for life in self._lives:
            life.lives.stop(grace)

    async def enter(self, handlers: Iterable[BridgeHandler[Any]]) -> None:
        """Enter those that are not. Raises `HandlerLifeError`; then none of them is left entered.

        If cancelled, they are left.
        """
        known = {each for life in self._lives for each in life.handlers}
        life = _Life([each for each in handlers if each not in known], self._stop_timeout)
        if not life.handlers:
            return
        await self._opened.wait()
        if self._tasks is None or self._stops:
            raise HandlerLifeError("the server stops")
        self._lives.append(life)
        self._tasks.start_soon(self._live, life)
        done = False
        try:
            with anyio.move_on_after(_ENTERED_WITHIN):
                await life.entered.wait()
                done = life.error is None
        finally:
            if not done:
                life.lives.stop(0)
                life.leave.set()
        if not done:
            late = f"handlers did not start within {_ENTERED_WITHIN:g} s"
            raise life.error or HandlerLifeError(late)

    async def leave_after(
        self, left: Iterable[StillRunning], handlers: Collection[BridgeHandler[Any]]
    ) -> None:
        """Leave those that were entered together, if all are among `handlers`, which nobody is
        asked of any more, when what runs of them has ended."""
        for each in left:
            await each.ended()
        gone = set(handlers)
        for life in self._lives:
            if life.entered.is_set() and gone.issuperset(life.handlers):
                life.leave.set()

    async def _live(self, life: _Life) -> None:
        try:
            # A stop from outside leaves them after the last answer, as those of the start.
            with anyio.CancelScope(shield=True):
                async with life.lives.lived():
                    life.entered.set()
                    try:
                        await life.leave.wait()
                    finally:
                        # Cancelled by a handler, as by a task group of its own: traps come first.
                        if not life.leave.is_set():
                            self._fail(HandlerLifeError("a handler that was reloaded has ended"))
                            with anyio.CancelScope(shield=True):
                                await life.leave.wait()
        except Exception as error:
            life.error = error
            if life.entered.is_set():
                self._fail(error)
        finally:
            self._lives.remove(life)
            life.entered.set()
