"""A handler that waits has a task of its own, as in any other program."""

import asyncio
import gc
import weakref
from contextvars import ContextVar
from functools import partial

import anyio
import anyio.lowlevel
import pytest
from misbehaving import MAGIC, REQUEST, Misbehaves, on_asyncio, on_trio, run_guest

from vmibridge import BridgePacket, BridgeResponse, BridgeServer, OutcomeKind, method
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeGuest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("only_new_garbage")]

VAR = ContextVar("var", default="unset")


class Tasks(Misbehaves):
    """Notes the task of each call."""

    def __init__(self):
        self.names, self.kept, self.ended = [], [], []

    def note(self):
        info = anyio.get_current_task()
        self.names.append(info.name)
        return info

    @method(1)
    async def waits(self, vmi, packet):
        self.note()
        await anyio.sleep(packet.value1 / 1000)
        return BridgeResponse(value1=1)

    @method(2)
    async def at_once(self, vmi, packet):
        self.note()
        return BridgeResponse(value1=1)

    @method(3)
    async def keeps_its_task(self, vmi, packet):
        task = asyncio.current_task()
        task.add_done_callback(lambda _: self.ended.append(1))
        self.kept.append(weakref.ref(task))
        await anyio.sleep(0)
        return BridgeResponse(value1=1)

    @method(4)
    async def leaves_a_timer(self, vmi, packet):
        await anyio.sleep(0)
        await asyncio.timeout(0.01).__aenter__()
        return BridgeResponse(value1=1)

    @method(5)
    async def sets_a_variable(self, vmi, packet):
        before = VAR.get()
        token = VAR.set("mine")
        await anyio.sleep(0)
        inside = VAR.get()
        if packet.value1:
            VAR.reset(token)
        return BridgeResponse(value1=1).with_output((before, inside))


@on_asyncio
async def test_it_is_named_after_handler_and_method():
    handler = Tasks()

    async def scenario(caller):
        for _ in range(3):
            await caller.call(1)

    await run_guest(handler, scenario)
    assert handler.names[1:] == ["vmibridge handler tasks.waits"] * 2


async def test_once_it_waits_it_is_named_so_also_the_first_time_and_on_trio():
    class Waits(Tasks):
        @method(7)
        async def waits_twice(self, vmi, packet):
            await anyio.sleep(0)
            self.note()
            return BridgeResponse(value1=1)

    handler = Waits()

    async def scenario(caller):
        for _ in range(2):
            await caller.call(7)
        await caller.call(2)

    await run_guest(handler, scenario)
    *waited, at_once = handler.names
    assert waited == ["vmibridge handler waits.waits_twice"] * 2
    assert "vmibridge handler" not in at_once


@pytest.mark.parametrize("first", [1, 2], ids=["waits", "does not wait"])
async def test_a_request_leaves_no_circles_for_the_garbage_collector(first):
    """1,000 handlers that sleep had a server collect garbage for half of its time."""
    found = []

    async def scenario(caller):
        for count in (5, 205):
            gc.collect()
            for _ in range(count):
                await caller.call(first)
            found.append(gc.collect())

    gc.disable()
    try:
        await run_guest(Tasks(), scenario)
    finally:
        gc.enable()
    assert found[1] - found[0] < 200


async def test_one_that_does_not_wait_has_none():
    handler = Tasks()

    async def scenario(caller):
        for _ in range(3):
            await caller.call(2)

    await run_guest(handler, scenario)
    assert len(set(handler.names)) == 1
    assert "handler" not in handler.names[0].removeprefix("vmibridge.")


async def test_with_own_task_false_it_shares_one():
    class Shares(Tasks):
        own_task = False

    handler = Shares()

    async def scenario(caller):
        for _ in range(3):
            await caller.call(1)

    await run_guest(handler, scenario)
    assert len(set(handler.names)) == 1
    assert "vmibridge handler" not in handler.names[0]


@on_asyncio
async def test_the_task_ends_with_its_trap():
    handler = Tasks()

    async def scenario(caller):
        for _ in range(5):
            await caller.call(3)
        await anyio.sleep(0.01)
        return len({id(task()) for task in handler.kept if task() is not None})

    await run_guest(handler, scenario)
    assert len(handler.ended) == 5


@on_asyncio
@pytest.mark.parametrize("first", [True, False], ids=["the first time", "later"])
async def test_a_timer_that_is_left_open_hits_no_other_trap(first):

    async def scenario(caller):
        if not first:
            await caller.call(4)
        await caller.call(4)
        return [(await caller.call(1, value1=30, vcpu=vcpu)).kind for vcpu in range(3)]

    assert await run_guest(Tasks(), scenario) == [OutcomeKind.HANDLED] * 3


@pytest.mark.parametrize("resets", [0, 1])
async def test_a_context_variable_is_that_of_its_trap(resets):
    async def scenario(caller):
        return [(await caller.call(5, value1=resets)).output for _ in range(4)]

    assert await run_guest(Tasks(), scenario) == [("unset", "mine")] * 4


async def test_deadlines_places_and_a_stop_hold_for_it():
    handler = Tasks()

    async def scenario(caller):
        await caller.call(1)
        kinds = []
        async with anyio.create_task_group() as tasks:
            for vcpu in range(6):

                async def call(vcpu=vcpu):
                    kinds.append((await caller.call(1, value1=60_000, vcpu=vcpu)).kind)

                tasks.start_soon(call)
        return kinds

    kinds = await run_guest(handler, scenario, timeout=0.05, in_flight=2)
    assert kinds == [OutcomeKind.TIMEOUT] * 6


async def test_a_serial_handler_has_its_turns_in_tasks_of_their_own():
    running = []

    class Serial(Tasks):
        serial = True

        @method(6)
        async def one_at_a_time(self, vmi, packet):
            running.append(1)
            assert len(running) == 1
            self.note()
            await anyio.sleep(0.001)
            running.pop()
            return BridgeResponse(value1=1)

    async def scenario(caller):
        kinds = []
        async with anyio.create_task_group() as tasks:
            for vcpu in range(6):

                async def call(vcpu=vcpu):
                    kinds.extend([(await caller.call(6, vcpu=vcpu)).kind for _ in range(3)])

                tasks.start_soon(call)
        return kinds

    assert await run_guest(Serial(), scenario) == [OutcomeKind.HANDLED] * 18


# asyncio has no stack of what a task awaits before Python 3.14.
@on_trio
async def test_its_stack_is_that_of_its_task():
    import trio

    async def deep(event):
        await event.wait()

    class Deep(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            self.task = trio.lowlevel.current_task()
            self.event = anyio.Event()
            self.begun.set()
            await deep(self.event)
            return BridgeResponse(value1=1)

    handler = Deep()

    async def scenario(caller):
        found = []
        for _ in range(2):
            handler.begun = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caller.call)
                await handler.begun.wait()
                frames = handler.task.iter_await_frames()
                found.append("deep" in [frame.f_code.co_name for frame, _ in frames])
                handler.event.set()
        return found

    assert await run_guest(handler, scenario) == [True, True]


@on_asyncio
async def test_one_that_was_taken_before_a_stop_has_the_grace_period():
    """Also where its task has not begun yet: a guest whose next host was there got the fallback."""

    class StopsAtTheSecond(Tap):
        def trap(self, event):
            if event.seq == 2:
                # Before the task that is made for this trap begins.
                asyncio.get_running_loop().call_soon(server.stop)

    async def guest(vm):
        for value in (1, 2):
            assert (await vm.call(BridgePacket(MAGIC, REQUEST, 1, value))).rax == 1

    async with FakeGuest(guest) as vm:
        server = BridgeServer(vm, Tasks(), taps=[StopsAtTheSecond()], grace=60, stop_timeout=120)
        kinds = [outcome.kind async for outcome in server.run()]
    assert kinds == [OutcomeKind.HANDLED] * 2


async def test_where_many_are_ready_they_begin_in_the_order_of_their_traps():
    """On trio their workers are started together, and run in any order."""

    class Order(Misbehaves):
        def __init__(self):
            self.begun = []

        @method(1)
        async def waits(self, vmi, packet):
            self.begun.append(vmi.event.seq)
            await anyio.sleep(0)
            return BridgeResponse(value1=1)

    handler, vcpus = Order(), 50

    async def guest(vm):
        for _ in range(2):
            async with anyio.create_task_group() as all_of_them:
                for vcpu in range(vcpus):
                    call = partial(vm.call, vcpu=vcpu)
                    all_of_them.start_soon(call, BridgePacket(MAGIC, REQUEST, 1))
        # With one that answers at once, too: what is left then takes the next trap.
        await vm.call(BridgePacket(MAGIC, REQUEST, 9))

    async with FakeGuest(guest) as vm:
        outcomes = [each async for each in BridgeServer(vm, handler).run()]
    assert len(outcomes) == 2 * vcpus + 1
    assert handler.begun == sorted(handler.begun)
    assert len(handler.begun) == 2 * vcpus
