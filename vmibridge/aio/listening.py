"""How long a peer is silent, without the time in which this loop could not hear it.

A handler that blocks the loop keeps it from what peers have sent meanwhile. Then timers are due
before it is received: trio runs the tasks of a turn in any order, and asyncio a task that passes on
what came one turn later. What counts as silence is therefore time at which the loop turned, and not
time that has gone by:

- `sleep_late` says how late it was, and who watches a peer excuses it for that.
- `wait_listening` waits for an event, `fail_after_listening` is `anyio.fail_after` with such time.

A loop that is always a little late has every wait longer by as much, and no wait without an end.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

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
    scope = anyio.CancelScope()
    raised: BaseException | None = None

    async def watch() -> None:
        for _ in range(_STEPS):
            await anyio.sleep(seconds / _STEPS)
        scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            with scope:
                try:
                    yield
                except BaseException as error:
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
        raise raised
    if scope.cancelled_caught:
        raise TimeoutError
