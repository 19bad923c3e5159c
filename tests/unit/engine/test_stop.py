"""A stop: take no more, answer what is there, leave handlers a while, let the guest go."""

import time

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    method,
)
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
WORK, HANG, FAST = (BridgePacket(MAGIC, 1, code) for code in (1, 2, 3))
FOR_EVER = 60.0


class Job(BridgeHandler[None]):
    MAGIC = MAGIC
    REQUEST = 1

    def __init__(self):
        self.begun = anyio.Event()
        self.end = anyio.Event()
        self.cancelled = False

    @method(1)
    async def work(self, vmi, packet):
        self.begun.set()
        try:
            await self.end.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled = True
            raise
        return BridgeResponse(value1=1)

    @method(3)
    async def fast(self, vmi, packet):
        return BridgeResponse(value1=3)


class Stage:
    """A guest with one call that a handler is at, and what is done to the server."""

    def __init__(self, *, soft_timeout=None, **options):
        self.job = Job()
        self.job.soft_timeout = soft_timeout
        self.options = {"timeout": FOR_EVER, "stop_timeout": FOR_EVER, **options}
        self.answer = None
        self.refused = False

    async def guest(self, vm):
        self.answer = (await vm.call(WORK)).rax
        await anyio.sleep_forever()

    async def act(self, server, vm):
        raise NotImplementedError

    async def run(self, act):
        async with FakeGuest(self.guest) as vm, anyio.create_task_group() as tasks:
            server = BridgeServer(vm, Bridge(self.job), **self.options)

            async def act_when_it_has_begun():
                await self.job.begun.wait()
                await act(server, vm)

            tasks.start_soon(act_when_it_has_begun)
            outcomes = [outcome.kind.value async for outcome in server.run()]
        assert sorted(vm.writes) == sorted(event.seq for event in vm.events)
        assert server.summary.guest is not None
        return outcomes, server.summary


async def test_a_handler_may_end_by_itself_in_the_grace_period():
    async def act(server, vm):
        server.stop()
        await anyio.sleep(0.01)
        stage.job.end.set()

    stage = Stage(grace=FOR_EVER)
    outcomes, _ = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["handled"], False)


async def test_after_it_the_handler_is_cancelled():
    async def act(server, vm):
        server.stop()

    stage = Stage(grace=0.01)
    outcomes, _ = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["cancelled"], True)


async def test_a_second_stop_cuts_it_short():
    async def act(server, vm):
        server.stop()
        await anyio.sleep(0.01)
        assert not stage.job.cancelled
        server.stop(now=True)

    stage = Stage(grace=FOR_EVER)
    started = time.monotonic()
    outcomes, _ = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["cancelled"], True)
    assert time.monotonic() - started < FOR_EVER / 2


async def test_a_stop_now_leaves_no_grace():
    async def act(server, vm):
        server.stop(now=True)

    stage = Stage(grace=FOR_EVER)
    outcomes, _ = await stage.run(act)
    assert outcomes == ["cancelled"]


async def test_no_trap_is_taken_in_the_grace_period():
    async def act(server, vm):
        server.stop()
        await anyio.sleep(0.01)
        with anyio.move_on_after(0.01):
            await vm.call(FAST, vcpu=1)
        stage.job.end.set()

    stage = Stage(grace=FOR_EVER)
    outcomes, _ = await stage.run(act)
    assert outcomes == ["handled"]


async def test_what_is_queued_is_answered_in_its_order():
    """A vCPU that runs ahead, as none of a real machine does: its traps stay in order."""

    async def act(server, vm):
        async def call():
            assert (await vm.call(FAST)).rax == 0xBAD

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await anyio.sleep(0.01)
            server.stop()
            stage.job.end.set()

    stage = Stage(grace=FOR_EVER, fallback=BridgeResponse(value1=0xBAD))
    outcomes, _ = await stage.run(act)
    assert outcomes == ["handled", "cancelled"]


async def test_the_deadline_for_the_lot_is_kept_when_the_grace_period_is_longer():
    async def act(server, vm):
        server.stop()

    stage = Stage(grace=FOR_EVER, stop_timeout=0.05)
    outcomes, _ = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["cancelled"], True)


async def test_a_loop_that_is_held_up_for_longer_cuts_no_answer_short():
    async def act(server, vm):
        server.stop()
        await anyio.sleep(0.01)
        time.sleep(0.15)

    stage = Stage(grace=0.04, stop_timeout=0.1)
    outcomes, _ = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["cancelled"], True)


async def test_a_handler_without_a_trap_is_abandoned_and_counted():
    async def act(server, vm):
        while stage.answer is None:
            await anyio.sleep(0.001)
        assert stage.answer == Gate.WAIT
        server.stop()

    stage = Stage(grace=0.01, soft_timeout=0.005)
    outcomes, summary = await stage.run(act)
    assert (outcomes, stage.job.cancelled) == (["waiting"], True)
    assert summary.abandoned == 1


async def test_a_cancellation_leaves_no_grace():
    stage = Stage(grace=FOR_EVER)
    async with FakeGuest(stage.guest) as vm:
        with anyio.CancelScope() as scope:

            async def cancel():
                await stage.job.begun.wait()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                async for _ in BridgeServer(vm, Bridge(stage.job), grace=FOR_EVER).run():
                    pass
    assert set(vm.writes) == {1}
    assert stage.job.cancelled
