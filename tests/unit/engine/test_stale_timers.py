"""A timer that a handler leaves open, and which cancels the task when that has other work."""

import asyncio

import anyio
import pytest
from engine_parts import MAGIC, serve, trap
from misbehaving import Misbehaves, on_asyncio, run_guest
from waiting import until

from vmibridge import BridgeHandler, BridgeResponse, OutcomeKind, method
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeBackend

pytestmark = [pytest.mark.anyio, on_asyncio]


class LeavesATimer(BridgeHandler[None]):
    """`fire` is what a timer of `asyncio.timeout` does when its time has come."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.fired = 0
        self.task = None

    def fire(self):
        self.fired += 1
        self.task.cancel()

    @method(1)
    async def leaves_one(self, vmi, packet):
        self.task = asyncio.current_task()
        if packet.value2:
            asyncio.get_running_loop().call_soon(self.fire)
        return BridgeResponse(value1=1)

    @method(2)
    async def at_once(self, vmi, packet):
        return BridgeResponse(value1=2)


ONE_OF_EACH = [trap(1, 1, r9=1), trap(2, 2), trap(3, 1), trap(4, 2)]


async def test_an_answer_whose_writing_is_cut_off_ends_as_failed_and_its_vcpu_goes_on():
    class Stuck(FakeBackend):
        async def resume(self, event, writes):
            await super().resume(event, writes)
            if event.seq == 1:
                await anyio.sleep_forever()

    handler = LeavesATimer()
    outcomes, _, server = await serve(ONE_OF_EACH, handler, backend=Stuck(ONE_OF_EACH))
    assert handler.fired == 1
    assert [outcome.kind.value for outcome in outcomes] == ["failed", *["handled"] * 3]
    assert outcomes[0].error == (
        "not written: cut off by a timer that a handler left open in this task"
    )
    assert server.summary.total == 4


async def test_a_trap_that_runs_natively_is_let_go_all_the_same():
    class Stuck(FakeBackend):
        async def resume(self, event, writes):
            await super().resume(event, writes)
            if event.seq == 2:
                handler.fire()
                await anyio.sleep_forever()

    handler = LeavesATimer()
    events = [trap(1, 1), trap(2, 1, magic=MAGIC + 1), trap(3, 2)]
    outcomes, _, server = await serve(events, handler, backend=Stuck(events))
    assert [outcome.event.seq for outcome in outcomes] == [1, 3]
    assert server.summary.native == 1


async def test_an_outcome_that_waits_for_room_is_not_lost():
    class Full(Tap):
        full = True
        waited = 0

        async def room(self):
            self.waited += 1
            # The timer fires at the first wait.
            while self.waited < 2:
                await anyio.sleep(0)
            await until(lambda: handler.fired)
            self.full = False

    handler, tap = LeavesATimer(), Full()
    outcomes, _, _ = await serve(ONE_OF_EACH, handler, taps=[tap])
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 4
    assert (handler.fired, tap.waited) == (1, 2)


async def test_what_a_consumer_does_before_the_guest_goes_on_is_cut_off_alone(caplog):
    async def before_resume(outcome):
        if outcome.event.seq == 1:
            await anyio.sleep_forever()

    handler = LeavesATimer()
    outcomes, _, _ = await serve(ONE_OF_EACH, handler, before_resume=before_resume)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 4
    assert handler.fired == 1
    assert "before_resume of trap 1 of vm vm: cut off by a timer" in caplog.text


@pytest.mark.parametrize("waits_for", ["turn", "place"])
async def test_a_request_that_waits_to_begin_begins(waits_for):
    class Queues(Misbehaves):
        serial = waits_for == "turn"

        def __init__(self):
            self.go_on = anyio.Event()

        @method(1)
        async def holds_it(self, vmi, packet):
            await self.go_on.wait()
            return BridgeResponse(value1=1)

        @method(2)
        async def begins(self, vmi, packet):
            return BridgeResponse(value1=2)

    class Tasks(Tap):
        """Notes the task of the worker that takes a trap."""

        def trap(self, event):
            tasks[event.vcpu] = asyncio.current_task()

    handler, tasks, found = Queues(), {}, []

    async def scenario(caller):
        async def call(code, vcpu):
            found.append((await caller.call(code, vcpu=vcpu)).kind)

        async with anyio.create_task_group() as vcpus:
            for number in (1, 2):
                vcpus.start_soon(call, number, number)
                await anyio.wait_all_tasks_blocked()
            # As a timer that was left open at a trap before.
            tasks[2].cancel()
            await anyio.wait_all_tasks_blocked()
            assert not found
            handler.go_on.set()

    await run_guest(handler, scenario, in_flight=1, taps=[Tasks()])
    assert found == [OutcomeKind.HANDLED] * 2


class Waits(LeavesATimer):
    @method(3)
    async def waits(self, vmi, packet):
        self.is_other_task = asyncio.current_task() is not self.task
        if self.task is not None:
            asyncio.get_running_loop().call_soon(self.fire)
        for _ in range(3):
            await anyio.sleep(0)
        return BridgeResponse(value1=3)


class WaitsInASharedTask(Waits):
    own_task = False


@pytest.mark.parametrize(
    ("made", "before", "kind"),
    [
        (Waits, [3], "handled"),
        (Waits, [], "cancelled"),
        (WaitsInASharedTask, [3], "cancelled"),
    ],
    ids=["own task", "first wait", "shared task"],
)
async def test_a_handler_that_waits_is_hit_where_it_shares_the_task(made, before, kind):
    """What docs/guide.md says: nothing tells such a cancellation from one of its own."""
    handler = made()
    events = [trap(seq, code) for seq, code in enumerate([*before, 1, 3, 2], 1)]
    outcomes, _, _ = await serve(events, handler)
    kinds = [outcome.kind.value for outcome in outcomes]
    assert kinds == ["handled"] * (len(before) + 1) + [kind, "handled"]
    assert handler.fired == 1
    assert handler.is_other_task is (kind == "handled")


class CancelsItsTaskWhenItIsCutOff(Waits):
    @method(4, timeout=0.01)
    async def too_late(self, vmi, packet):
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            asyncio.current_task().cancel()
            return BridgeResponse(value1=4)


class CutOffInASharedTask(CancelsItsTaskWhenItIsCutOff):
    own_task = False


class CutOffInTurn(CancelsItsTaskWhenItIsCutOff):
    serial = True


@pytest.mark.parametrize("before", [[], [3]], ids=["first wait", "later wait"])
@pytest.mark.parametrize("made", [CancelsItsTaskWhenItIsCutOff, CutOffInASharedTask, CutOffInTurn])
async def test_one_that_cancels_its_task_when_it_is_cut_off_ends_nothing_else(made, before):
    """With its very last step, so that nothing of it is there to be cancelled."""
    events = [trap(seq, code) for seq, code in enumerate([*before, 4, 2, 4, 3], 1)]
    outcomes, _, _ = await serve(events, made())
    kinds = [outcome.kind.value for outcome in outcomes]
    assert kinds == ["handled"] * len(before) + ["timeout", "handled", "timeout", "handled"]
