"""Run a coroutine inside another, and learn when it first waits.

Most handlers answer without waiting. They are run to their end in the worker that
took the trap, with no task switch; only a trap that does wait costs a second worker.
Each trap runs in a copy of the context, so that context variables that one handler
sets never reach the next trap.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import copy_context
from types import coroutine
from typing import Any, TypeVar

R = TypeVar("R")


@coroutine
def run_inline(body: Coroutine[Any, Any, R], on_wait: Callable[[], None]) -> Generator[Any, Any, R]:
    """Await `body`; call `on_wait` once, right before it is first suspended.

    What the event loop sends or throws goes to `body` unchanged, cancellation included.
    """
    context = copy_context()
    try:
        wish = context.run(body.send, None)
    except StopIteration as end:
        result: R = end.value
        return result
    on_wait()
    while True:
        try:
            reply = yield wish
        except BaseException as error:
            step: Callable[[Any], Any] = body.throw
            reply = error
        else:
            step = body.send
        try:
            wish = context.run(step, reply)
        except StopIteration as end:
            result = end.value
            return result


def asyncio_task() -> "asyncio.Task[object] | None":
    """The task that this runs in, where the loop is asyncio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


async def forget_cancellation(task: "asyncio.Task[object]") -> None:
    """Take back what a handler did that cancelled the task it was run in."""
    while task.cancelling():
        task.uncancel()
    # What is not delivered yet.
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
