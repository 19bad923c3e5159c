"""Tasks that a task group holds without a handle of anyio's for each."""

import asyncio
from contextlib import suppress
from contextvars import ContextVar

import anyio
import anyio.lowlevel
import pytest
import trio

from vmibridge.aio.handler_scope import AsyncioHandlerScope
from vmibridge.aio.own_tasks import own_tasks, starter

LOOPS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
on_asyncio = pytest.mark.parametrize("anyio_backend", LOOPS[:2], ids=["asyncio", "uvloop"])
on_trio = pytest.mark.parametrize("anyio_backend", LOOPS[2:], ids=["trio"])
pytestmark = pytest.mark.anyio


def start(own, body, *, patience=60):
    """Start a task that runs `body()`; returns its scope."""
    scope = AsyncioHandlerScope(patience)

    async def run():
        with scope:
            await body()

    own.start(scope, run(), "its name")
    return scope


@on_asyncio
async def test_a_group_waits_for_its_tasks_also_for_one_that_another_starts_late():
    steps = []

    async def body():
        steps.append(asyncio.current_task().get_name())
        await anyio.sleep(0)
        if len(steps) < 3:
            start(own, body)

    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        start(own, body)
        own.close()
    assert steps == ["its name"] * 3


@on_asyncio
async def test_a_group_that_is_closed_can_hold_another_one():
    steps = []

    async def body():
        await anyio.sleep(0)
        steps.append(True)

    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        start(own, body)
        own.close()
        await anyio.wait_all_tasks_blocked()
        assert steps == [True]
        start(own, body)
    assert steps == [True, True]


@on_asyncio
@pytest.mark.parametrize("begun", [True, False], ids=["it runs", "it has not begun"])
@pytest.mark.parametrize("outside", [True, False], ids=["scope around", "group"])
async def test_what_cancels_the_group_cancels_them(begun, outside):
    ended = []

    async def body():
        try:
            await anyio.sleep_forever()
        finally:
            with suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
            ended.append(anyio.current_effective_deadline())

    with anyio.CancelScope() as around:
        async with anyio.create_task_group() as group:
            own = own_tasks(group)
            start(own, body)
            own.close()
            if begun:
                await anyio.wait_all_tasks_blocked()
            (around if outside else group.cancel_scope).cancel()
    assert around.cancelled_caught is outside
    assert ended == [float("-inf")] * begun
    assert asyncio.current_task().cancelling() == 0


@on_asyncio
async def test_one_that_is_cancelled_ends_alone():
    others = []

    async def body():
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0)
            others.append("cancelled")

    async def other():
        await anyio.lowlevel.checkpoint()
        others.append("ended")

    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        scope = start(own, body)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        start(own, other)
        own.close()
    assert sorted(others) == ["cancelled", "ended"]


@on_asyncio
@pytest.mark.parametrize("error", [LookupError, SystemError, GeneratorExit])
async def test_an_error_ends_the_group_and_comes_out_of_it(error):
    async def fails():
        await anyio.sleep(0)
        raise error

    async def run():
        async with anyio.create_task_group() as group:
            own = own_tasks(group)
            try:
                start(own, fails)
                start(own, anyio.sleep_forever)
                await anyio.sleep_forever()
            finally:
                own.close()

    with pytest.RaisesGroup(error):
        await run()


@on_asyncio
async def test_one_whose_task_is_cancelled_from_outside_ends_the_group():
    async def body():
        tasks.append(asyncio.current_task())
        await anyio.sleep_forever()

    tasks = []
    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        start(own, body)
        start(own, body)
        own.close()
        await anyio.wait_all_tasks_blocked()
        tasks[0].cancel()
    assert group.cancel_scope.cancel_called
    assert [task.cancelled() for task in tasks] == [True, True]


@on_asyncio
async def test_tasks_are_made_by_the_factory_of_the_loop():
    made = []

    def factory(loop, body, **options):
        made.append(options.get("name"))
        return asyncio.Task(body, loop=loop, **options)

    loop = asyncio.get_running_loop()
    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        loop.set_task_factory(factory)
        try:
            start(own, anyio.lowlevel.checkpoint)
        finally:
            loop.set_task_factory(None)
        own.close()
    assert len(made) == 2


@on_asyncio
async def test_scopes_of_anyio_in_one_are_inside_that_of_the_group():
    found = []

    async def body():
        with anyio.move_on_after(60):
            async with anyio.create_task_group() as inner:
                inner.start_soon(anyio.sleep, 0)
            found.append(anyio.get_current_task().parent_id)
        with anyio.fail_after(60):
            await anyio.to_thread.run_sync(found.append, "in a thread")

    async with anyio.create_task_group() as group:
        own = own_tasks(group)
        start(own, body)
        own.close()
    assert found == [id(asyncio.current_task()), "in a thread"]


async def test_what_a_starter_starts_ends_before_its_group():
    steps = []

    async def body():
        await anyio.sleep(0)
        steps.append(True)

    async with anyio.create_task_group() as group:
        starter(group, body)()
        assert not steps
    assert steps == [True]


async def test_what_a_starter_starts_is_cancelled_with_its_group():
    async def body():
        begun.set()
        await anyio.sleep_forever()

    begun = anyio.Event()
    async with anyio.create_task_group() as group:
        start_one = starter(group, body)
        start_one()
        await begun.wait()
        group.cancel_scope.cancel()
        start_one()


async def test_an_error_in_what_a_starter_starts_ends_its_group():
    async def fails():
        raise LookupError

    async def run():
        async with anyio.create_task_group() as group:
            starter(group, fails)()
            await anyio.sleep_forever()

    with pytest.RaisesGroup(LookupError):
        await run()


async def test_a_group_that_has_ended_starts_nothing():
    async with anyio.create_task_group() as group:
        start_one = starter(group, anyio.lowlevel.checkpoint)
    with pytest.raises(RuntimeError):
        start_one()


@on_trio
async def test_a_task_of_trio_is_as_one_of_its_nursery():
    """In what trio shows of it to others, and what it shows to the task."""

    class Instrument(trio.abc.Instrument):
        def task_spawned(self, task):
            spawned.append(task)

    async def body():
        task = trio.lowlevel.current_task()
        with pytest.raises(LookupError):
            variable.get()
        variable.set("the task's")
        seen.append((task.name, task.parent_nursery, task.parent_nursery.child_tasks))
        with anyio.move_on_after(60):
            async with trio.open_nursery() as inner:
                inner.start_soon(anyio.sleep, 0)
        assert await anyio.to_thread.run_sync(trio.from_thread.run, anyio.sleep, 0) is None

    variable = ContextVar("variable")
    spawned, seen = [], []
    instrument = Instrument()
    async with anyio.create_task_group() as group:
        start_one = starter(group, body)
        nursery = group._nursery
        trio.lowlevel.add_instrument(instrument)
        # Not what is set where it is started, but where its starter was made.
        variable.set("the caller's")
        start_one()
        (own,) = spawned
        trio.lowlevel.remove_instrument(instrument)
    assert seen == [(f"{__name__}.{body.__qualname__}", nursery, {own})]
