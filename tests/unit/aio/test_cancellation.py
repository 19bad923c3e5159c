"""An object that holds a task group raises what its block raised, as it was."""

from contextlib import AsyncExitStack

import anyio
import pytest

from vmibridge.aio.cancellation import UnwrappedExit

pytestmark = pytest.mark.anyio


class Holder(UnwrappedExit):
    async def __aenter__(self):
        async with AsyncExitStack() as stack:
            self.tasks = await stack.enter_async_context(anyio.create_task_group())
            self._stack = stack.pop_all()
        return self


async def test_an_error_of_the_block_is_raised_as_it_was():
    with pytest.raises(KeyError) as caught:
        async with Holder():
            raise KeyError("mine")
    assert caught.value.args == ("mine",)


async def test_errors_of_tasks_stay_a_group():
    async def fail():
        raise KeyError("of a task")

    with pytest.raises(ExceptionGroup) as caught:
        async with Holder() as holder:
            holder.tasks.start_soon(fail)
            await anyio.sleep_forever()
    assert [str(error) for error in caught.value.exceptions] == ["'of a task'"]


async def test_both_stay_a_group():
    failed = anyio.Event()

    async def fail():
        failed.set()
        raise KeyError("of a task")

    with pytest.raises(ExceptionGroup) as caught:
        async with Holder() as holder:
            holder.tasks.start_soon(fail)
            await failed.wait()
            raise ValueError("mine")
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def test_a_block_that_is_left_or_cancelled_raises_nothing():
    async with Holder():
        pass
    with anyio.CancelScope() as scope:
        async with Holder():
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
