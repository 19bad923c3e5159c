"""What a handler runs in: cancelled apart, then for good, and it leaves nothing open."""

import asyncio
from contextlib import suppress

import anyio
import anyio.lowlevel
import pytest

from vmibridge.aio.handler_scope import AsyncioHandlerScope
from vmibridge.aio.loops import handler_scope

LOOPS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
on_asyncio = pytest.mark.parametrize("anyio_backend", LOOPS[:2], ids=["asyncio", "uvloop"])
pytestmark = pytest.mark.anyio


async def cancelled_soon(scope, body):
    """Run `body` in the scope, and cancel that when everything waits."""
    done = anyio.Event()

    async def run():
        with scope:
            await body()
        done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        with anyio.fail_after(60):
            await done.wait()


@on_asyncio
async def test_it_is_cancelled_once_and_what_it_awaits_on_its_way_out_is_awaited():
    steps = []

    async def body():
        try:
            await anyio.sleep_forever()
        finally:
            for step in range(3):
                await anyio.sleep(0)
                await anyio.lowlevel.checkpoint_if_cancelled()
                steps.append(step)

    await cancelled_soon(AsyncioHandlerScope(60), body)
    assert steps == [0, 1, 2]
    assert asyncio.current_task().cancelling() == 0


@on_asyncio
async def test_what_was_lost_comes_once_more_and_is_awaited_as_the_first():
    """`asyncio.wait_for` may lose a cancellation before Python 3.12. The query that psycopg goes on
    to is cancelled at its server by the next one, which takes some turns."""
    steps = []

    async def body():
        with suppress(asyncio.CancelledError):
            await anyio.sleep_forever()
        try:
            await anyio.sleep_forever()
        finally:
            for step in range(3):
                await anyio.sleep(0)
                steps.append(step)

    await cancelled_soon(AsyncioHandlerScope(0.02), body)
    assert steps == [0, 1, 2]
    assert asyncio.current_task().cancelling() == 0


async def test_what_does_not_end_is_cancelled_for_good_after_its_patience():
    ended = []

    async def body():
        try:
            await anyio.sleep_forever()
        finally:
            try:
                await anyio.sleep_forever()
            finally:
                try:
                    await anyio.sleep_forever()
                finally:
                    try:
                        await anyio.sleep_forever()
                    finally:
                        ended.append(True)

    await cancelled_soon(handler_scope(0.02), body)
    assert ended == [True]


async def test_one_that_takes_no_notice_ends_as_it_likes():
    async def body():
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            pass

    await cancelled_soon(handler_scope(60), body)


async def test_errors_pass_and_cancellations_do_not():
    async def fails():
        try:
            await anyio.sleep_forever()
        finally:
            raise LookupError

    async def fails_in_a_group():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.start_soon(fails)

    with pytest.RaisesGroup(LookupError):
        await cancelled_soon(handler_scope(60), fails)
    with pytest.RaisesGroup(pytest.RaisesGroup(LookupError)):
        await cancelled_soon(handler_scope(60), fails_in_a_group)


@on_asyncio
async def test_with_a_shield_it_is_cancelled_once_when_that_has_ended():
    go_on, steps = anyio.Event(), []

    async def body():
        with anyio.CancelScope(shield=True):
            await go_on.wait()
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0)
            await anyio.sleep(0)
            steps.append(True)

    scope = AsyncioHandlerScope(60)
    async with anyio.create_task_group() as tasks:

        async def run():
            with scope:
                await body()

        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not steps
        go_on.set()
    assert steps == [True]


@on_asyncio
async def test_a_cancellation_from_around_it_does_not_wait_for_its_patience():
    async def body():
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep_forever()

    scope = AsyncioHandlerScope(3600)

    async def run():
        with scope:
            await body()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


async def test_what_is_left_open_is_found_and_closed():
    async def body():
        scope = handler_scope(60)
        with scope:
            assert not scope.is_left_open
            with anyio.CancelScope():
                pass
            assert not scope.is_left_open
            anyio.move_on_after(0).__enter__()
            anyio.CancelScope().__enter__()
            assert scope.is_left_open
            scope.close_left()
            assert not scope.is_left_open
            await anyio.sleep(0.01)
        # Left to the scope itself, they are closed when it is left.
        with handler_scope(60):
            anyio.move_on_after(0).__enter__()
        await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body)


async def test_a_cancellation_that_comes_late_is_not_that_of_the_next_scope():
    async def body():
        first, second = handler_scope(60), handler_scope(60)
        with first:
            pass
        with second:
            first.cancel()
            await anyio.sleep(0.01)
            went_on.set()

    went_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body)
    assert went_on.is_set()


@pytest.mark.parametrize("cancels_the_outer", [False, True])
async def test_nothing_of_a_scope_that_was_cancelled_is_in_the_next(cancels_the_outer):
    async def body():
        for _ in range(3):
            with anyio.CancelScope() as outer, handler_scope(60) as scope:
                (outer if cancels_the_outer else scope).cancel()
        with handler_scope(60):
            await anyio.sleep(0.01)
            went_on.set()

    went_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body)
    assert went_on.is_set()


async def test_a_task_that_is_left_under_one_is_not_under_the_next():
    """Of a task group that a handler left open, and that was cancelled with it."""
    ended = anyio.Event()

    async def left():
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async def body():
        with handler_scope(60) as first:
            group = anyio.create_task_group()
            await group.__aenter__()
            group.start_soon(left)
            await anyio.sleep(0.01)
            first.close_left()
        with handler_scope(60):
            await ended.wait()
            await anyio.sleep(0.01)
            went_on.set()

    went_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body)
    assert went_on.is_set()
