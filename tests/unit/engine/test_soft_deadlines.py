"""Handlers that outlive their trap: soft deadlines, retries, guest memory in between."""

import math

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    method,
)
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
SOFT = 0.01


class Slow(BridgeHandler[str]):
    """Ends when the test says so."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747
    soft_timeout = SOFT

    def __init__(self):
        self.runs = []
        self.go_on = anyio.Event()
        self.cancelled = anyio.Event()
        self.events = []

    @method(1)
    async def work(self, vmi, packet):
        self.runs.append(packet.value1)
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        return BridgeResponse(value1=packet.value1 + 100).with_output("done")

    @method(2)
    async def read_later(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        first = (await vmi.memory.read(0x2000, 1))[0]
        self.events.append(vmi.event.seq)
        return BridgeResponse(value1=first)

    @method(3, retry_values=(1, 2))
    async def counted(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        return BridgeResponse(value1=7)

    @method(4)
    async def fail_later(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        raise LookupError("on purpose")


WORK, READ_LATER, COUNTED, FAIL_LATER = (
    BridgePacket(MAGIC, 1, code, value1=5) for code in (1, 2, 3, 4)
)


async def serve(guest, *targets, memory=None, **options):
    async with FakeGuest(guest, memory=memory) as backend:
        server = BridgeServer(backend, Bridge(*targets), **options)
        outcomes = [outcome async for outcome in server.run()]
    assert sorted(backend.writes) == sorted(event.seq for event in backend.events)
    return outcomes, server.summary


def kinds(outcomes):
    return [outcome.kind.value for outcome in outcomes]


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
        @method(1, soft_timeout=method_)
        async def work(self, vmi, packet):
            await anyio.sleep(5 * SOFT)
            return BridgeResponse(0x60)

        members = {"MAGIC": MAGIC, "REQUEST": 1, "work": work, "soft_timeout": handler}
        kind = type("Kind", (BridgeHandler,), {**members, "may_wait": may_wait})

        async def guest(vm):
            assert (await vm.call(WORK)).rax == (Gate.WAIT if waits else 0x60)

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

        @method(1, may_wait=method_)
        async def work(self, vmi, packet):
            await anyio.sleep(5 * SOFT)
            return BridgeResponse(0x60)

        members = {"MAGIC": MAGIC, "REQUEST": 1, "work": work, "may_wait": handler}
        kind = type("Kind", (BridgeHandler,), members)

        async def guest(vm):
            assert (await vm.call(WORK)).rax == (Gate.WAIT if waits else 0x60)

        await serve(guest, kind(), soft_timeout=SOFT)


class TestWhichRetry:
    @pytest.mark.parametrize(
        ("again", "where"),
        [
            (WORK.with_value1(6), {}),
            (WORK.with_value4(1), {}),
            (WORK, {"address_space": 0x2000}),
            (WORK, {"ring": 3}),
        ],
    )
    async def test_another_request_is_none(self, again, where):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK, address_space=0x1000)).rax == Gate.WAIT
            assert (await vm.call(again, **{"address_space": 0x1000, **where})).rax == Gate.WAIT

        _, summary = await serve(guest, slow)
        assert (len(slow.runs), summary.retries) == (2, 0)

    async def test_another_vcpu_may_bring_it(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK, vcpu=0)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK, vcpu=3)).rax == 105

        await serve(guest, slow)
        assert slow.runs == [5]

    async def test_a_value_that_counts_the_attempts_is_left_out(self):
        slow = Slow()

        async def guest(vm):
            for attempt in range(3):
                assert (await vm.call(COUNTED.with_value3(attempt))).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(COUNTED.with_value3(3))).rax == 7

        outcomes, summary = await serve(guest, slow)
        assert (slow.runs, summary.retries) == ([5], 3)
        assert [outcome.packet.value3 for outcome in outcomes] == [0, 1, 2, 3]

    async def test_a_second_one_at_the_same_time_is_told_to_wait_at_once(self):
        slow = Slow()
        slow.soft_timeout = 30 * SOFT
        told = []

        async def retry(vm, vcpu):
            told.append((await vm.call(WORK, vcpu=vcpu)).rax)
            if len(told) == 1:
                slow.go_on.set()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            async with anyio.create_task_group() as tasks:
                for vcpu in range(2):
                    tasks.start_soon(retry, vm, vcpu)

        await serve(guest, slow)
        assert told == [Gate.WAIT, 105]
        assert slow.runs == [5]

    async def test_requests_alike_of_two_vcpus_are_two_requests(self):
        slow = Slow()
        results = []

        async def poll(vm, vcpu):
            while (answer := await vm.call(WORK, vcpu=vcpu)).rax == Gate.WAIT:
                slow.go_on.set() if len(slow.runs) == 2 else None
            results.append(answer.rax)

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(2):
                    tasks.start_soon(poll, vm, vcpu)

        await serve(guest, slow)
        assert results == [105, 105]
        assert slow.runs == [5, 5]


class TestResults:
    async def test_that_nobody_collects_expire(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(8 * SOFT)
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow, result_timeout=2 * SOFT)
        assert kinds(outcomes) == ["waiting", "handled"]
        assert slow.runs == [5, 5]
        assert (summary.uncollected, summary.retries) == (1, 0)

    async def test_that_are_left_at_the_end_are_counted(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)

        _, summary = await serve(guest, slow)
        assert (summary.uncollected, summary.abandoned) == (1, 0)

    async def test_of_a_handler_that_runs_when_the_guest_ends_are_never_made(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT

        _, summary = await serve(guest, slow)
        assert slow.cancelled.is_set()
        assert (summary.uncollected, summary.abandoned) == (0, 1)

    async def test_are_bounded_in_number(self):
        ends = [anyio.Event() for _ in range(10)]

        class Later(BridgeHandler[None]):
            MAGIC, REQUEST, soft_timeout = MAGIC, 1, SOFT

            async def handle(self, vmi, packet):
                await ends[packet.value1].wait()
                return BridgeResponse(0x77)

        later = [WORK.with_value1(value) for value in range(10)]

        async def guest(vm):
            for value, packet in enumerate(later):
                assert (await vm.call(packet)).rax == Gate.WAIT
                ends[value].set()
            assert (await vm.call(later[9])).rax == 0x77

        _, summary = await serve(guest, Later(), in_flight=4)
        assert summary.uncollected == 9
        assert summary.retries == 1


class TestMemory:
    async def test_is_read_with_the_trap_of_the_retry(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(READ_LATER)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert slow.events == []
            vm.memory.write(0x2000, b"\x42")
            assert (await vm.call(READ_LATER, vcpu=1)).rax == 0x42

        await serve(guest, slow, memory={0x2000: b"\x01"})
        assert slow.events == [2]

    async def test_may_be_in_the_middle_of_an_access_when_the_guest_goes_on(self):
        """The access that is under way holds the answer; the next one waits for the retry."""
        slow, reading, read_on = Slow(), anyio.Event(), anyio.Event()
        slow.go_on.set()
        pages = []

        class SlowMemory(FakeGuest):
            async def read_physical(self, event, address, size):
                if address == 0x3000 - 4 and event.seq == 1:
                    reading.set()
                    await read_on.wait()
                assert event.seq in self._open, "the guest runs"
                return await super().read_physical(event, address, size)

        class Reader(Slow):
            @method(1)
            async def work(self, vmi, packet):
                pages.append(await vmi.memory.read(0x3000 - 4, 8))
                return BridgeResponse(value1=1)

        async def let_it_read(vm):
            await reading.wait()
            await anyio.sleep(3 * SOFT)
            assert not vm.writes
            read_on.set()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(let_it_read, vm)
                assert (await vm.call(WORK)).rax == Gate.WAIT
            vm.memory.write(0x3000 - 4, b"changed!")
            assert (await vm.call(WORK)).rax == 1

        memory = {0x3000 - 4: b"original"}
        async with SlowMemory(guest, memory=memory) as backend:
            server = BridgeServer(backend, Reader())
            assert kinds([outcome async for outcome in server.run()]) == ["waiting", "handled"]
        assert pages in ([b"original"], [b"changed!"])

    async def test_fails_after_the_hard_deadline_also_when_it_was_parked(self):
        told = []

        class Stubborn(Slow):
            @method(1)
            async def work(self, vmi, packet):
                try:
                    await vmi.memory.read(0x2000, 1) if await self.go_on.wait() else None
                    await vmi.memory.read(0x2000, 1)
                finally:
                    with pytest.raises(GuestMemoryError) as error:
                        await vmi.memory.read(0x2000, 1)
                    told.append(error.value.reason)

        slow = Stubborn()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(10 * SOFT)
            assert (await vm.call(WORK)).rax == 0xBAD

        await serve(guest, slow, timeout=5 * SOFT, fallback=BridgeResponse(0xBAD))
        assert told == ["the trap is answered: the guest runs again"]


class TestHardDeadline:
    async def test_cancels_the_handler_and_its_retry_gets_the_fallback(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            await slow.cancelled.wait()
            assert (await vm.call(WORK)).rax == 0xBAD

        outcomes, _ = await serve(guest, slow, timeout=0.05, fallback=BridgeResponse(value1=0xBAD))
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
    async def test_one_that_was_asked_is_not_asked_again_by_a_retry(self):
        """Not even when the next in order waits for its turn by then."""
        asked, turn = [], anyio.Event()

        class Passing(BridgeDispatch):
            may_wait = True

            def contracts(self):
                return [BridgeContract(1, MAGIC)]

            async def dispatch(self, vmi, packet):
                asked.append(packet.value1)
                await anyio.sleep(2 * SOFT)
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
