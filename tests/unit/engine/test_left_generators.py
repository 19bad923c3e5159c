"""An async generator that a handler leaves in its middle is closed in the task of the handler."""

import asyncio
import gc
import sys

import anyio
import anyio.lowlevel
import pytest
from misbehaving import Misbehaves, on_asyncio, run_guest

from vmibridge import BridgeResponse, OutcomeKind, method

pytestmark = pytest.mark.anyio


def task():
    return anyio.get_current_task().id


class Leaves(Misbehaves):
    """Leaves `rows` with the first row; method 2 waits for longer than any timer in it."""

    def __init__(self, rows, *, waits=False, keeps=False, raises=False):
        self.rows, self.waits, self.keeps, self.raises = rows, waits, keeps, raises
        self.kept = None

    @method(1)
    async def go(self, vmi, packet):
        if self.waits:
            await anyio.lowlevel.checkpoint()
        async for row in self.rows():
            if self.raises:
                raise LookupError
            return BridgeResponse(value1=row)
        return None

    @method(2, timeout=60)
    async def other(self, vmi, packet):
        await anyio.sleep(0.02)
        return BridgeResponse(value1=1)

    @method(3)
    async def keep(self, vmi, packet):
        self.kept = self.kept or self.rows()
        return BridgeResponse(value1=await anext(self.kept))


async def scope_rows():
    with anyio.move_on_after(0.01):
        yield 1
        yield 2


async def group_rows():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 0.01)
        yield 1
        yield 2


async def nested_rows():
    """Without `aclosing` the inner one ends after the outer one, in any task."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        async for row in scope_rows():
            yield row


async def test_one_that_leaves_another_open_ends_no_other_trap():
    async def scenario(caller):
        await caller.call()
        return [(await caller.call(2, vcpu=vcpu)).kind for vcpu in range(3)]

    assert await run_guest(Leaves(nested_rows), scenario) == [OutcomeKind.HANDLED] * 3


@pytest.mark.parametrize("rows", [scope_rows, group_rows])
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
async def test_it_ends_with_its_trap(rows, waits, raises):
    async def scenario(caller):
        kinds = [(await caller.call()).kind for _ in range(3)]
        return kinds, [(await caller.call(2, vcpu=vcpu)).kind for vcpu in range(3)]

    kinds, others = await run_guest(Leaves(rows, waits=waits, raises=raises), scenario)
    assert kinds == [OutcomeKind.FAILED if raises else OutcomeKind.HANDLED] * 3
    assert others == [OutcomeKind.HANDLED] * 3


async def test_its_clean_up_is_in_the_task_of_the_handler_before_the_answer():
    seen = []

    async def rows():
        begun_in = task()
        try:
            yield 1
        finally:
            await anyio.lowlevel.checkpoint()
            seen.append(task() == begun_in)

    async def scenario(caller):
        outcome = await caller.call()
        return outcome.kind, list(seen)

    assert await run_guest(Leaves(rows), scenario) == (OutcomeKind.HANDLED, [True])


async def test_one_that_is_kept_goes_on_with_the_next_trap():
    async def rows():
        for row in range(10):
            yield row

    async def scenario(caller):
        return [(await caller.call(3)).response.value1 for _ in range(4)]

    assert await run_guest(Leaves(rows), scenario) == [0, 1, 2, 3]


async def test_one_of_a_task_that_the_handler_started_is_left_alone():
    closed = []

    class Starts(Misbehaves):
        async def __aenter__(self):
            self.group = await anyio.create_task_group().__aenter__()

        async def __aexit__(self, *_):
            self.group.cancel_scope.cancel()
            await self.group.__aexit__(None, None, None)

        @method(1)
        async def go(self, vmi, packet):
            self.group.start_soon(self.read)
            await anyio.sleep(0.01)
            return BridgeResponse(value1=1)

        async def read(self):
            async for _ in self.rows():
                pass

        async def rows(self):
            try:
                while True:
                    yield 1
                    await anyio.sleep(0.001)
            finally:
                closed.append(task())

    async def scenario(caller):
        await caller.call()
        await caller.call()
        return list(closed)

    assert await run_guest(Starts(), scenario) == []


@pytest.mark.parametrize("error", [LookupError("x"), SystemExit(3), KeyboardInterrupt()])
async def test_what_its_clean_up_raises_is_logged_and_the_answer_stands(error, caplog):
    async def rows():
        try:
            yield 1
        finally:
            raise error

    async def scenario(caller):
        return (await caller.call()).kind

    assert await run_guest(Leaves(rows), scenario) is OutcomeKind.HANDLED
    assert "handler leaves left an async generator, which raised" in caplog.text


async def test_clean_up_that_hangs_ends_with_the_deadline_of_the_trap():
    async def rows():
        try:
            yield 1
        finally:
            await anyio.sleep_forever()

    async def scenario(caller):
        return [(await caller.call()).kind, (await caller.call(2, vcpu=1)).kind]

    kinds = await run_guest(Leaves(rows), scenario, timeout=0.1, stop_timeout=0.2)
    assert kinds == [OutcomeKind.TIMEOUT, OutcomeKind.HANDLED]


async def test_the_hooks_are_set_once_and_hold_no_generator():
    async def scenario(caller):
        hooks = sys.get_asyncgen_hooks()
        await caller.call()
        return hooks

    first = await run_guest(Leaves(scope_rows), scenario)
    second = await run_guest(Leaves(scope_rows), scenario)
    assert first == second
    gc.collect()
    kinds = ("AsyncioHandlerScope", "TrioHandlerScope")
    scopes = [each for each in gc.get_objects() if type(each).__name__ in kinds]
    assert not any(each.begun or each.left for each in scopes)


@on_asyncio
async def test_a_timer_in_one_that_is_left_hits_nobody():
    async def rows():
        async with asyncio.timeout(0.01):
            yield 1
            yield 2

    async def scenario(caller):
        await caller.call()
        return [(await caller.call(2)).kind for _ in range(2)]

    assert await run_guest(Leaves(rows), scenario) == [OutcomeKind.HANDLED] * 2
