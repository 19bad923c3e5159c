"""Handlers that do anything, over several VMs: each trap is answered once, and nothing is left."""

import asyncio
import gc
import logging
import threading
from contextlib import AsyncExitStack, suppress
from itertools import product
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from misbehaving import MAGIC, REQUEST, Misbehaves

from vmibridge import Bridge, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.recording import Recorder
from vmibridge.testing import FakeGuest

GOOD_REQUEST = 2
SHORT = 0.02


class Own(BaseException):
    pass


class Speechless(Exception):
    def __str__(self):
        raise Own

    __repr__ = __str__


BEHAVIOURS = {}


def behaviour(function):
    BEHAVIOURS[function.__name__] = function
    return function


def raising(name, error):
    async def raises(vmi):
        raise error()

    BEHAVIOURS[f"raises {name}"] = raises


for each_name, each_error in {
    "an error": LookupError,
    "its own": Own,
    "speechless": Speechless,
    "exit": lambda: SystemExit(3),
    "generator exit": GeneratorExit,
    "stop iteration": StopIteration,
    "cancelled of asyncio": asyncio.CancelledError,
    "a group": lambda: BaseExceptionGroup("several", [Own(), ValueError("x")]),
}.items():
    raising(each_name, each_error)


@behaviour
async def answers(vmi):
    return BridgeResponse(value1=1)


@behaviour
async def waits(vmi):
    await anyio.sleep(0.001)
    return BridgeResponse(value1=1)


@behaviour
async def hangs(vmi):
    await anyio.sleep_forever()


@behaviour
async def returns_no_answer(vmi):
    return "no answer"


@behaviour
async def rejects(vmi):
    return None


@behaviour
async def swallows_its_cancellation(vmi):
    with suppress(anyio.get_cancelled_exc_class()):
        await anyio.sleep_forever()
    return BridgeResponse(value1=1)


@behaviour
async def cleans_up_for_long(vmi):
    try:
        await anyio.sleep_forever()
    finally:
        await anyio.sleep_forever()


@behaviour
async def cleans_up_in_a_shield(vmi):
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.move_on_after(0.01, shield=True):
            await anyio.sleep_forever()


@behaviour
async def leaves_a_scope(vmi):
    anyio.CancelScope().__enter__()
    return BridgeResponse(value1=1)


@behaviour
async def leaves_a_scope_that_is_cancelled(vmi):
    scope = anyio.CancelScope().__enter__()
    scope.cancel()
    return BridgeResponse(value1=1)


@behaviour
async def leaves_a_timer(vmi):
    await anyio.lowlevel.checkpoint()
    anyio.move_on_after(0.005).__enter__()
    return BridgeResponse(value1=1)


@behaviour
async def leaves_a_group(vmi):
    group = await anyio.create_task_group().__aenter__()
    group.start_soon(anyio.sleep_forever)
    return BridgeResponse(value1=1)


@behaviour
async def leaves_a_scope_and_raises(vmi):
    anyio.move_on_after(0.005).__enter__()
    raise LookupError


async def scope_rows():
    with anyio.move_on_after(0.005):
        yield 1
        yield 2


async def group_rows():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        yield 1
        yield 2


async def rude_rows():
    try:
        yield 1
    finally:
        raise Own


@behaviour
async def leaves_rows(vmi):
    async for row in scope_rows():
        return BridgeResponse(value1=row)
    return None


@behaviour
async def leaves_rows_of_a_group(vmi):
    await anyio.lowlevel.checkpoint()
    async for row in group_rows():
        return BridgeResponse(value1=row)
    return None


@behaviour
async def leaves_rude_rows(vmi):
    async for row in rude_rows():
        return BridgeResponse(value1=row)
    return None


@behaviour
async def leaves_rows_by_a_deadline(vmi):
    async for _ in group_rows():
        await anyio.sleep_forever()


@behaviour
async def cancels_a_scope_of_its_own(vmi):
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.lowlevel.checkpoint()
    return BridgeResponse(value1=1)


@behaviour
async def fails_in_a_group(vmi):
    async def fail():
        raise Own

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await anyio.sleep_forever()


@behaviour
async def cancels_its_task(vmi):
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        asyncio.current_task().cancel()
    return BridgeResponse(value1=1)


@behaviour
async def cancels_its_task_and_waits(vmi):
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        asyncio.current_task().cancel()
    await anyio.sleep(0.001)
    return BridgeResponse(value1=1)


@behaviour
async def waits_in_a_thread(vmi):
    await anyio.to_thread.run_sync(threading.Event().wait, 0.03)
    return BridgeResponse(value1=1)


@behaviour
async def reads_no_memory(vmi):
    await vmi.memory.read(0xDEAD_0000, 16)


@behaviour
async def prints(vmi):
    return BridgeResponse(value1=1)


@behaviour
async def gives_a_strange_output(vmi):
    return BridgeResponse(value1=1).with_output(object())


@behaviour
async def computes_between_waits(vmi):
    for _ in range(5):
        sum(range(1000))
        await anyio.lowlevel.checkpoint()
    return BridgeResponse(value1=1)


NAMES = sorted(BEHAVIOURS)
WHEN = ["at once", "when it has waited", "when it is cut off"]
DEEDS = list(product(WHEN, NAMES))


class Misbehaving(Misbehaves):
    """Does what value1 says."""

    async def handle(self, vmi, packet):
        when, name = DEEDS[packet.value1]
        if when == "when it has waited":
            await anyio.lowlevel.checkpoint()
        elif when == "when it is cut off":
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()
        return await BEHAVIOURS[name](vmi)


class Good(Misbehaves):
    """Waits for a moment, so that something could hit it."""

    REQUEST = GOOD_REQUEST
    timeout = 60.0

    async def handle(self, vmi, packet):
        if packet.value1 % 2:
            await anyio.sleep(0.002)
        return BridgeResponse(value1=packet.value1)


def test_there_are_behaviours_enough():
    assert len(DEEDS) >= 90


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def threads():
    # Those of the loop that wait for work are its own; the clock of a stop is there until the
    # process ends, in which a test before this one may have run a command.
    found = {each.name for each in threading.enumerate() if "vmibridge" in each.name}
    return found - {"vmibridge stop"}


plans = st.lists(
    st.lists(st.sampled_from(range(len(DEEDS))), min_size=1, max_size=5), min_size=1, max_size=3
)


async def serve(plan, own_task, folder):
    """A VM for each list, with a vCPU that does what it says, and one VM that does no harm."""
    outcomes, good = [], []

    def bad_guest(behaviours):
        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(innocent, vm)
                for number in behaviours:
                    await vm.call(BridgePacket(MAGIC, REQUEST, 0, number), vcpu=1)

        return guest

    async def innocent(vm):
        for number in range(8):
            writes = await vm.call(BridgePacket(MAGIC, GOOD_REQUEST, 0, number), vcpu=2)
            good.append(writes is not None and writes.rax == number)

    guests = [bad_guest(behaviours) for behaviours in plan] + [innocent]
    vms = [FakeGuest(guest, vm=f"vm{number}") for number, guest in enumerate(guests)]
    handler = type("Tried", (Misbehaving,), {"own_task": own_task})
    async with AsyncExitStack() as stack:
        recorder = await stack.enter_async_context(Recorder(folder, stem="law"))
        for vm in vms:
            await stack.enter_async_context(vm)
        server = BridgeServer(
            vms,
            lambda vm: Bridge(handler(), Good()),
            timeout=SHORT,
            stop_timeout=0.2,
            taps=[recorder],
        )
        async for outcome in server.run():
            outcomes.append(outcome)
    return outcomes, good


@pytest.mark.usefixtures("only_new_garbage")
@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("own_task", [True, False], ids=["own task", "shared task"])
def test_each_trap_is_answered_once_and_nothing_is_left(anyio_backend, own_task, tmp_path, capsys):
    backend, options = anyio_backend
    logging.disable(logging.CRITICAL)
    try:

        @settings(
            max_examples=12,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        @given(plans)
        def law(plan):
            before = open_files()
            folder = tmp_path / "recordings"
            folder.mkdir(exist_ok=True)
            left = []

            async def main():
                with anyio.fail_after(60):
                    result = await serve(plan, own_task, folder)
                with anyio.move_on_after(5):
                    while len(anyio.get_running_tasks()) > 1 and backend != "trio":
                        await anyio.sleep(0.01)
                left.extend(anyio.get_running_tasks() if backend != "trio" else ())
                return result

            outcomes, good = anyio.run(main, backend=backend, backend_options=options)
            gc.collect()
            bad = [o for o in outcomes if o.packet.request == REQUEST]
            assert len(bad) == sum(map(len, plan))
            assert all(o.writes is not None for o in outcomes)
            assert len({(o.event.vm, o.event.seq) for o in outcomes}) == len(outcomes)
            assert len(good) == 8 * (len(plan) + 1)
            assert all(good)
            kinds = {o.kind for o in outcomes if o.packet.request == GOOD_REQUEST}
            assert kinds == {OutcomeKind.HANDLED}
            assert len(left) <= 1
            assert open_files() <= before
            assert threads() == set()

        # A loop opens some files at its first run in a process.
        anyio.run(serve, [[0]], own_task, tmp_path, backend=backend, backend_options=options)
        law()
    finally:
        logging.disable(logging.NOTSET)
