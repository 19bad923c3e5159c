"""How long a peer is silent, without the time in which this loop could not hear it.

A handler that blocks the loop keeps it from what peers have sent meanwhile. Then timers are due
before it is received: trio runs the tasks of a turn in any order, and asyncio a task that passes on
what came one turn later. What counts as silence is therefore time at which the loop turned, and not
time that has gone by:

- `sleep_late` says how late it was, and who watches a peer excuses it for that.
- `wait_listening` waits for an event, `fail_after_listening` is `anyio.fail_after` with such time.

A loop that is always a little late has every wait longer by as much, and no wait without an end.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from sniffio import current_async_library

_STEPS = 4
"""A loop that stands still costs a peer at most one of these parts of its time."""


async def sleep_late(seconds: float) -> float:
    """Sleep for `seconds`; return for how many more the loop did not turn."""
    until = anyio.current_time() + seconds
    await anyio.sleep(seconds)
    return max(0.0, anyio.current_time() - until)


async def wait_listening(event: anyio.Event, seconds: float) -> None:
    """Wait until it is set, for at most `seconds`, not counting time in which the loop stood still.

    Does not say which of both it was.
    """
    for _ in range(_STEPS):
        with anyio.move_on_after(seconds / _STEPS):
            await event.wait()
            return


@asynccontextmanager
async def fail_after_listening(seconds: float) -> AsyncIterator[None]:
    """Cancel the block after `seconds`, and raise `TimeoutError` if it was cut off.

    Time in which the loop stood still does not count.
    """
    with anyio.CancelScope() as scope:
        if current_async_library() == "trio":
            async with _watched(scope, seconds):
                yield
        else:
            timer = _Timer(scope, seconds / _STEPS)
            try:
                yield
            finally:
                timer.stop()
    if scope.cancelled_caught:
        raise TimeoutError


class _Timer:
    """Cancels a scope on asyncio. A task for it would leave circles, and each connection of a
    server has one."""

    def __init__(self, scope: anyio.CancelScope, step: float) -> None:
        self._scope = scope
        self._step = step
        self._left = _STEPS
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_later(step, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self._next = self._loop.call_later(self._step, self._tick)
        else:
            self._scope.cancel()

    def stop(self) -> None:
        self._next.cancel()


@asynccontextmanager
async def _watched(scope: anyio.CancelScope, seconds: float) -> AsyncIterator[None]:
    """A block with a task that cancels `scope`."""
    raised: BaseException | None = None

    async def watch() -> None:
        for _ in range(_STEPS):
            await anyio.sleep(seconds / _STEPS)
        scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                yield
            except BaseException as error:  # raised again, but out of the group
                raised = error
                raise
            group.cancel_scope.cancel()
    except BaseExceptionGroup:
        # That task raises nothing but its cancellation: without it there would be no group.
        if raised is None:
            raise
    else:
        raised = None
    if raised is not None:
        try:
            raise raised
        finally:
            # Else a circle, which only the garbage collector would end.
            del raised
