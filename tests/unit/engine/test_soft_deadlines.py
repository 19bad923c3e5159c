"""Handlers that outlive their trap: the soft deadline, WAIT, and the hard deadline."""

import math

import anyio
import pytest
from soft_deadline_parts import FAIL_LATER, MAGIC, SOFT, WORK, Slow, kinds, serve

from vmibridge import (
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    Gate,
    Outcome,
    OutcomeKind,
    method,
)

pytestmark = pytest.mark.anyio


class TestSoftDeadline:
    async def test_the_guest_is_told_to_wait_and_the_retry_gets_the_result(self):
        slow = Slow()

        async def guest(vm):
            first = await vm.call(WORK)
            assert (first.rax, first.rdx) == (Gate.WAIT, 0x5747)
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting", "handled"]
        assert [outcome.output for outcome in outcomes] == [None, "done"]
        assert slow.runs == [5]
        assert summary.retries == 1

    async def test_a_retry_that_comes_early_waits_with_the_handler(self):
        slow = Slow()

        async def go_on():
            slow.go_on.set()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on)
                assert (await vm.call(WORK)).rax == 105

        outcomes, _ = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting", "handled"]
        assert slow.runs == [5]

    async def test_however_often_the_guest_asks_the_handler_runs_once(self):
        slow = Slow()

        async def guest(vm):
            for _ in range(20):
                assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting"] * 20 + ["handled"]
        assert slow.runs == [5]
        assert summary.retries == 20

    async def test_another_request_after_the_result_runs_the_handler_again(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK)).rax == 105
            assert (await vm.call(WORK)).rax == 105

        await serve(guest, slow)
        assert slow.runs == [5, 5]

    async def test_a_failure_is_kept_for_the_retry_too(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(FAIL_LATER)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert (await vm.call(FAIL_LATER)).rax == 0xBAD

        outcomes, _ = await serve(guest, slow, fallback=BridgeResponse(value1=0xBAD))
        assert kinds(outcomes) == ["waiting", "failed"]

    async def test_a_handler_that_is_quick_enough_is_never_told_of(self):
        slow = Slow()
        slow.soft_timeout = 60.0  # which a busy machine needs not, either
        slow.go_on.set()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow)
        assert kinds(outcomes) == ["handled"]
        assert summary.retries == 0

    async def test_without_one_the_guest_is_held_to_the_hard_deadline(self):
        class Patient(Slow):
            soft_timeout = None

        async def guest(vm):
            assert (await vm.call(WORK)).rax is None

        outcomes, _ = await serve(guest, Patient(), timeout=5 * SOFT)
        assert kinds(outcomes) == ["timeout"]

    async def test_the_next_trap_of_the_vcpu_is_answered_meanwhile(self):
        slow = Slow()
        other = BridgePacket(MAGIC, 1, 1, value1=6)

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            assert (await vm.call(other)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(other)).rax == 106
            assert (await vm.call(WORK)).rax == 105

        await serve(guest, slow)
        assert slow.runs == [5, 6]


class TestWait:
    @pytest.mark.parametrize(
        ("server", "handler", "method_", "told"),
        [
            ({}, {}, {}, Gate.WAIT),
            ({"wait": BridgeResponse(2)}, {}, {}, 2),
            ({"wait": BridgeResponse(2)}, {"wait": BridgeResponse(3)}, {}, 3),
            (
                {"wait": BridgeResponse(2)},
                {"wait": BridgeResponse(3)},
                {"wait": BridgeResponse(4)},
                4,
            ),
        ],
    )
    async def test_is_what_the_nearest_of_method_handler_and_server_says(
        self, server, handler, method_, told
    ):
        @method(1, **method_)
        async def work(self, vmi, packet):
            await anyio.sleep_forever()

        kind = type(
            "Kind",
            (BridgeHandler,),
            {"MAGIC": MAGIC, "REQUEST": 1, "work": work, "may_wait": True, **handler},
        )

        async def guest(vm):
            assert (await vm.call(WORK)).rax == told

        await serve(guest, kind(), soft_timeout=SOFT, **server)

    @pytest.mark.parametrize(
        ("server", "handler", "method_", "may_wait", "waits"),
        [
            (None, None, None, True, False),
            (SOFT, None, None, True, True),
            (None, SOFT, None, False, True),
            (None, None, SOFT, False, True),
            (SOFT, math.inf, None, True, False),
            (SOFT, SOFT, math.inf, True, False),
        ],
    )
    async def test_comes_at_the_nearest_soft_deadline(
        self, server, handler, method_, may_wait, waits
    ):
        told = anyio.Event()

        @method(1, soft_timeout=method_)
        async def work(self, vmi, packet):
            await (told.wait() if waits else anyio.sleep(5 * SOFT))
            return BridgeResponse(0x60)

        members = {"MAGIC": MAGIC, "REQUEST": 1, "work": work, "soft_timeout": handler}
        kind = type("Kind", (BridgeHandler,), {**members, "may_wait": may_wait})

        async def guest(vm):
            assert (await vm.call(WORK)).rax == (Gate.WAIT if waits else 0x60)
            told.set()

        await serve(guest, kind(), soft_timeout=server)

    @pytest.mark.parametrize(
        ("handler", "method_", "waits"),
        [
            (False, None, False),
            (False, True, True),
            (True, None, True),
            (True, False, False),
        ],
    )
    async def test_that_of_the_server_is_for_those_alone_that_opt_in(self, handler, method_, waits):
        """Most guests take WAIT for an answer, as vmi-rs's file transfer does."""

        told = anyio.Event()

        @method(1, may_wait=method_)
        async def work(self, vmi, packet):
            await (told.wait() if waits else anyio.sleep(5 * SOFT))
            return BridgeResponse(0x60)

        members = {"MAGIC": MAGIC, "REQUEST": 1, "work": work, "may_wait": handler}
        kind = type("Kind", (BridgeHandler,), members)

        async def guest(vm):
            assert (await vm.call(WORK)).rax == (Gate.WAIT if waits else 0x60)
            told.set()

        await serve(guest, kind(), soft_timeout=SOFT)


class TestHardDeadline:
    async def test_cancels_the_handler_and_its_retry_gets_the_fallback(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            await slow.cancelled.wait()
            assert (await vm.call(WORK)).rax == 0xBAD

        outcomes, _ = await serve(guest, slow, timeout=1, fallback=BridgeResponse(value1=0xBAD))
        assert kinds(outcomes) == ["waiting", "timeout"]

    async def test_is_counted_from_the_first_trap_however_often_the_guest_asks(self):
        slow = Slow()

        async def guest(vm):
            while (await vm.call(WORK)).rax == Gate.WAIT:
                pass

        outcomes, _summary = await serve(
            guest, slow, timeout=0.1, fallback=BridgeResponse(value1=0xBAD)
        )
        assert kinds(outcomes)[-1] == "timeout"
        assert outcomes[-1].error == "no answer within 0.1 s"
        assert slow.runs == [5]


class TestDispatchers:
    @pytest.mark.parametrize("seconds", [0, 2 * SOFT], ids=["before", "after"])
    async def test_one_that_was_asked_is_not_asked_again_by_a_retry(self, seconds):
        """Not even when the next in order waits for its turn by then; whether the dispatcher
        passed the request on before its soft deadline or after it."""
        asked, turn = [], anyio.Event()

        class Passing(BridgeDispatch):
            may_wait = True

            def contracts(self):
                return [BridgeContract(1, MAGIC)]

            async def dispatch(self, vmi, packet):
                asked.append(packet.value1)
                await anyio.sleep(seconds)
                return Outcome(OutcomeKind.UNMATCHED, packet)

        class Serial(Slow):
            serial = True
            soft_timeout = SOFT

            @method(1)
            async def work(self, vmi, packet):
                self.runs.append(packet.value1)
                await turn.wait()
                return BridgeResponse(value1=packet.value1 + 100)

        serial = Serial()

        async def poll(vm, vcpu):
            while (answer := await vm.call(WORK.with_value1(vcpu), vcpu=vcpu)).rax == Gate.WAIT:
                if len(vm.events) > 12:
                    turn.set()
            assert answer.rax == 100 + vcpu

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(2):
                    tasks.start_soon(poll, vm, vcpu)

        await serve(guest, Passing(), serial, soft_timeout=SOFT)
        assert sorted(asked) == sorted(serial.runs) == [0, 1]
