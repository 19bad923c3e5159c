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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def fail_after_listening(seconds: float) -> Iterator[None]:
    """Cancel the block after `seconds`, and raise `TimeoutError` if it was cut off.

    Time in which the loop stood still does not count. As in `anyio.fail_after`, nothing is awaited
    on the way out: what the block has come to is not lost.
    """
    with anyio.CancelScope() as scope:
        stop = _cancel_later(scope, seconds / _STEPS)
        try:
            yield
        finally:
            stop()
    if scope.cancelled_caught:
        raise TimeoutError


def _cancel_later(scope: anyio.CancelScope, step: float) -> Callable[[], object]:
    """Cancel `scope` after `_STEPS` steps; returns what stops that."""
    if current_async_library() != "trio":
        return _Timer(scope, step).stop
    # Only here: trio is an extra.
    import trio

    own = trio.CancelScope()

    async def watch() -> None:
        with own:
            for _ in range(_STEPS):
                await trio.sleep(step)
            scope.cancel()

    # Trio has no timers without a task. One in a nursery would be waited for on the way out.
    trio.lowlevel.spawn_system_task(watch)
    return own.cancel


class _Timer:
    """Cancels a scope on asyncio."""

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
