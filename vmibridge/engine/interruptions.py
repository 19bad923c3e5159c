"""Cancellations of a worker's task that no cancel scope asked for.

On asyncio a handler may leave a timer open that cancels its task: `asyncio.timeout` that is not
left, `call_later(1.0, task.cancel)`. The task of a worker goes on to other traps, and the timer
finds it wherever it waits then. Where that is in the engine, no handler is meant, and the
wait is taken up again. Where another handler waits in the same task, the cancellation is
delivered to it: nothing tells it from one that this handler has asked for.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

import anyio

from vmibridge.aio.coroutines import asyncio_task, forget_cancellation
from vmibridge.engine.request import Worker

log: logging.Logger = logging.getLogger(__name__)


def is_being_cancelled() -> bool:
    """Whether a cancel scope around this was cancelled."""
    return anyio.current_effective_deadline() == -math.inf


async def forget_stale(error: BaseException) -> None:
    """Take back the cancellation `error`, for which a timer was the cause.

    Raises `error` where a cancel scope was.
    """
    task = asyncio_task()
    if task is None or is_being_cancelled():
        raise error
    await forget_cancellation(task)


async def forget_undelivered(task: "asyncio.Task[object] | None") -> bool:
    """Take back a cancellation that a handler has asked for with its last step, in this task;
    returns whether there was one.

    It waits for the next await, whatever that is; without one the task would end as cancelled, and
    with it all that its group does. On trio there is no such thing.
    """
    # Not public, and nothing else tells of it.
    if task is None or not getattr(task, "_must_cancel", False) or is_being_cancelled():
        return False
    await forget_cancellation(task)
    return True


async def wait_again(error: BaseException, wait: Callable[[], Awaitable[None]]) -> None:
    """Await `wait()`, which was cut off by the cancellation `error`, to its end.

    Raises the cancellation of a cancel scope, and what `wait` raises.
    """
    while True:
        await forget_stale(error)
        try:
            return await wait()
        except anyio.get_cancelled_exc_class() as another:
            error = another


async def is_the_handlers(
    worker: Worker, error: BaseException, cancelled: type[BaseException]
) -> bool:
    """Whether an error that came out of the scope of a handler ends with it.

    `cancelled` is the cancellation of the loop. It is not asked for here: a task may be closed when
    its loop is gone.
    """
    if isinstance(error, cancelled):
        # On asyncio a handler can raise this without any scope that was cancelled.
        if worker.task is None or is_being_cancelled():
            return False
        await forget_cancellation(worker.task)
        return True
    # A handler that was overtaken may end as it likes: its trap is answered. The scope has
    # taken its cancellations out of a group by now. Others are not its to take.
    if not worker.request.is_overtaken or not isinstance(error, Exception | BaseExceptionGroup):
        return False
    if not isinstance(error, Exception) and is_being_cancelled():
        return False
    log.debug("a handler raised while it was being cancelled", exc_info=error)
    return True
