"""The lives of handlers: each is entered before the guest runs, and left after the last answer.

Invariants:

- They are entered in order and left in reverse, each once, in one task: what a handler opens in
  `__aenter__`, such as a task group, is that task's.
- One that hangs ends with the server. Leaving has `stop_timeout` seconds; entering takes as long
  as it likes until a stop, and then as long as handlers have to end by themselves.
- One that is cut off, or fails, keeps no other from being left.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import anyio

from vmibridge.aio.coroutines import asyncio_task
from vmibridge.bridge.dispatch import one_line
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.interruptions import forget_undelivered, is_being_cancelled
from vmibridge.errors import HandlerLifeError


class CutOffError(HandlerLifeError):
    """A handler was being entered when the server stopped."""


class Lives:
    """See the module. For one use."""

    def __init__(self, handlers: Iterable[BridgeHandler[Any]], stop_timeout: float) -> None:
        self._handlers = [each for each in dict.fromkeys(handlers) if each.has_life()]
        self._stop_timeout = stop_timeout
        self._entering: anyio.CancelScope | None = None
        self._enter_within = math.inf

    def stop(self, grace: float) -> None:
        """The server stops: what is being entered has `grace` seconds."""
        self._enter_within = grace
        if self._entering is not None:
            within = anyio.current_time() + grace
            self._entering.deadline = min(self._entering.deadline, within)

    @asynccontextmanager
    async def lived(self) -> AsyncIterator[None]:
        """Have them entered for the time of the block.

        Raises `HandlerLifeError`, which names the handler; `CutOffError` at a stop.
        """
        async with AsyncExitStack() as lives:
            for handler in self._handlers:
                await lives.enter_async_context(self._life(handler))
            yield

    @asynccontextmanager
    async def _life(self, handler: BridgeHandler[Any]) -> AsyncIterator[None]:
        entered = False
        # Around all of it: what the handler opens while it is entered has to be inside.
        with anyio.CancelScope(deadline=anyio.current_time() + self._enter_within) as scope:
            self._entering = scope
            try:
                await _in_its_name(handler, "start", handler.__aenter__)
            finally:
                self._entering = None
            entered, scope.deadline = True, math.inf
            try:
                yield
            finally:
                scope.deadline = anyio.current_time() + self._stop_timeout
                leave = partial(handler.__aexit__, None, None, None)
                await _in_its_name(handler, "end", leave)
                scope.deadline = math.inf
            return
        # Only its own deadline leads to here.
        if not entered:
            raise CutOffError(f"handler {handler.name} did not start before the server stopped")
        raise HandlerLifeError(f"handler {handler.name} did not end in {self._stop_timeout:g} s")


async def _in_its_name(
    handler: BridgeHandler[Any], what: str, part: Callable[[], Awaitable[object]]
) -> None:
    """What a part of its life raises is a `HandlerLifeError`; a cancellation from around it passes.

    Anything else that a handler raises is its own, such as `SystemExit`. Raised in a task, those
    that are no `Exception` would end the loop, and with it what the handler has nothing to do with.
    So is a cancellation of the task that it asks for and does not wait for.
    """
    try:
        await part()
    except BaseException as error:
        kinds = (anyio.get_cancelled_exc_class(), BaseExceptionGroup)
        if isinstance(error, kinds) and is_being_cancelled():
            raise
        raise HandlerLifeError(
            f"handler {handler.name} did not {what}: {one_line(error)}"
        ) from error
    if await forget_undelivered(asyncio_task()):
        raise HandlerLifeError(f"handler {handler.name} did not {what}: it cancelled its task")
