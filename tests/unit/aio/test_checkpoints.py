"""How a handler hears that it is cut off: in one step on asyncio, in two on trio."""

from types import coroutine

import anyio
import pytest
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from vmibridge.aio.loops import hears_next, hears_nothing, tasks_left

pytestmark = pytest.mark.anyio


@coroutine
def watched(body, hears):
    """Await it; returns what `hears` says of each of its steps but the first, and its result."""
    said = []
    step, reply = body.send, None
    while True:
        try:
            wish = step(reply)
        except StopIteration as end:
            return said, end.value
        try:
            step, reply = body.send, (yield wish)
        except BaseException as error:  # it is the body's to catch
            step, reply = body.throw, error
        said.append(hears(body))


async def test_the_first_of_two_steps_only_looks_whether_the_task_is_cancelled(anyio_backend_name):
    with anyio.CancelScope() as scope:

        async def body():
            await checkpoint()
            scope.cancel()
            await cancel_shielded_checkpoint()
            try:
                await checkpoint()
            except anyio.get_cancelled_exc_class():
                return "heard"

        said, result = await watched(body(), hears_next())
    assert result == "heard"
    # Nobody is cancelled; a step of the body; and one or two that hear of it.
    assert said == [False, False, *([True, False] if anyio_backend_name == "trio" else [False])]


async def test_one_that_is_shielded_hears_of_nothing():
    with anyio.CancelScope() as scope:

        async def body():
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await checkpoint()
            return "went on"

        assert await watched(body(), hears_next()) == ([False], "went on")


async def test_one_that_has_the_lock_is_not_cancelled_as_it_takes_it(anyio_backend_name):
    lock = anyio.Lock()

    async def body():
        async with lock:
            await checkpoint()

    said, _ = await watched(body(), hears_nothing())
    assert said == [anyio_backend_name == "trio", False]


async def test_one_that_leaves_a_group_goes_on_when_its_tasks_left(anyio_backend_name):
    async def body():
        await checkpoint()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 60)
            tasks.cancel_scope.cancel()
        return "ended"

    (first, *said), result = await watched(body(), tasks_left())
    assert result == "ended"
    assert first is None
    # On asyncio it hears of the cancellation first.
    assert said == ([False] if anyio_backend_name == "trio" else [True, False])
