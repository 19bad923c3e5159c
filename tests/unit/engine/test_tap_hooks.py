"""The hooks of taps: what is told, in which order, and what it costs those that have none."""

import time

import anyio
import pytest
from hooked_taps import (
    COPY,
    END_SLOW,
    LINGER,
    MAGIC,
    MEMORY,
    NATIVE,
    SLOW,
    Hooked,
    Steps,
    serve,
    vmcall,
)

from vmibridge import (
    Bridge,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    Outcome,
    OutcomeKind,
    Policy,
    method,
)
from vmibridge.engine import queue_time, workers
from vmibridge.testing import FakeBackend, FakeGuest

pytestmark = pytest.mark.anyio


class Clock:
    """Stands still unless a test moves it: the time in the queue, and since a trap was taken."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic_ns()
        monkeypatch.setattr(workers, "loop_clock", lambda: lambda: self.now / 1e9)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class TestTheOrder:
    async def test_of_a_handler_that_does_not_wait(self):
        async def guest(vm):
            await vm.call(COPY)

        tap = Hooked()
        await serve(FakeGuest(guest, memory=MEMORY), Steps(), tap)
        assert tap.calls == [
            "begin",
            ("trap", 1),
            ("began", 1, "steps", "copy"),
            ("read", 1),
            ("wrote", 1),
            ("answered", 1, "handled", None),
            "end",
        ]
        (began,) = tap.begun
        assert (began.first, began.packet) == (1, COPY)

    async def test_of_one_that_waits_it_is_told_before_the_handler_runs(self):
        tap, steps, seen = Hooked(), Steps(), []

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vm.call, LINGER)
                await steps.began.wait()
                seen.extend(tap.calls)
                steps.go_on.set()

        await serve(FakeGuest(guest), steps, tap)
        assert seen == ["begin", ("trap", 1), ("began", 1, "steps", "linger")]
        assert tap.calls[3:] == [("answered", 1, "handled", None), "end"]

    async def test_of_a_soft_deadline_and_its_retry_the_handler_begins_once(self):
        async def guest(vm):
            assert (await vm.call(SLOW)).rax == Gate.WAIT
            await vm.call(END_SLOW)
            assert (await vm.call(SLOW)).rax == 3

        tap = Hooked()
        await serve(FakeGuest(guest), Steps(), tap)
        assert tap.calls == [
            "begin",
            ("trap", 1),
            ("began", 1, "steps", "slow"),
            ("answered", 1, "waiting", None),
            ("trap", 2),
            ("began", 2, "steps", "end_slow"),
            ("answered", 2, "handled", None),
            ("trap", 3),
            ("retried", 3, 1),
            ("answered", 3, "handled", 1),
            "end",
        ]
        # The ids that a trace is put together by.
        assert [began.first for began in tap.begun] == [1, 2]

    async def test_of_a_trap_that_is_not_ours(self):
        async def guest(vm):
            assert await vm.call(NATIVE) is None
            await vm.call(COPY)

        tap = Hooked()
        await serve(FakeGuest(guest, memory=MEMORY), Steps(), tap)
        assert tap.calls[:4] == [
            "begin",
            ("native", 1, "another magic"),
            ("trap", 2),
            ("began", 2, "steps", "copy"),
        ]

    async def test_one_that_nobody_answers_has_no_handler_that_begins(self):
        async def guest(vm):
            await vm.call(BridgePacket(MAGIC, 7, 1))
            await vm.call(COPY, ring=3)

        tap = Hooked()
        await serve(FakeGuest(guest), Steps(), tap, policy=Policy(rings=frozenset({0})))
        assert tap.calls[1:-1] == [
            ("trap", 1),
            ("answered", 1, "unmatched", None),
            ("trap", 2),
            ("answered", 2, "denied", None),
        ]

    async def test_a_code_without_a_method_has_no_name(self):
        async def guest(vm):
            await vm.call(BridgePacket(MAGIC, 1, 0x77))

        tap = Hooked()
        await serve(FakeGuest(guest), Steps(), tap)
        assert [(each.handler, each.method) for each in tap.begun] == [("steps", None)]


class Passes(BridgeDispatch):
    """Passes everything on, after it was told to."""

    may_wait = True

    def __init__(self, *, waits):
        self.waits = waits
        self.began = anyio.Event()
        self.go_on = anyio.Event()

    def contracts(self):
        return [BridgeContract(request=1, magic=MAGIC)]

    async def dispatch(self, vmi, packet):
        self.began.set()
        if self.waits:
            await self.go_on.wait()
        return Outcome(OutcomeKind.UNMATCHED, packet)


class TestARequestThatIsPassedOn:
    @pytest.mark.parametrize("waits", [False, True])
    async def test_each_handler_is_told_and_the_time_in_the_queue_once(self, waits, clock):
        passes, tap = Passes(waits=waits), Hooked()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vm.call, COPY)
                await passes.began.wait()
                clock.now += 400
                passes.go_on.set()

        await serve(FakeGuest(guest, memory=MEMORY), Bridge(passes, Steps()), tap)
        assert [(each.first, each.handler, each.method, each.queued) for each in tap.begun] == [
            (1, "Passes", None, 0),
            (1, "steps", "copy", None),
        ]
        assert [each.waited for each in tap.begun] == [0, 400 if waits else 0]

    async def test_after_its_guest_was_told_to_wait(self):
        """The vCPU has had another trap by then, whose time in the queue is its own."""
        passes, tap, copied = Passes(waits=True), Hooked(), anyio.Event()

        class Copy(Steps):
            @method(1)
            async def copy(self, vmi, packet):
                copied.set()
                return BridgeResponse(5)

        class Quick(BridgeHandler[None]):
            MAGIC, REQUEST = MAGIC, 2

            async def handle(self, vmi, packet):
                passes.go_on.set()
                await copied.wait()
                return BridgeResponse(6)

        async def guest(vm):
            assert (await vm.call(COPY)).rax == Gate.WAIT
            assert (await vm.call(BridgePacket(MAGIC, 2, 1))).rax == 6
            assert (await vm.call(COPY)).rax == 5

        bridge = Bridge(passes, Copy(), Quick())
        await serve(FakeGuest(guest), bridge, tap, soft_timeout=0.005)
        begun = [(each.event.seq, each.first, each.handler) for each in tap.begun]
        assert begun == [(1, 1, "Passes"), (2, 2, "quick"), (1, 1, "copy")]
        assert [each.queued is None for each in tap.begun] == [False, False, True]
        assert tap.calls[-2] == ("answered", 3, "handled", 1)


class TestTheTimeInTheQueue:
    """On a clock of the test's own."""

    def handler(self, clock, took):
        class Takes(BridgeHandler[None]):
            MAGIC, REQUEST = MAGIC, 1

            async def handle(self, vmi, packet):
                clock.now += took
                return BridgeResponse()

        return Takes()

    @pytest.mark.parametrize("vcpus", [1, 3])
    async def test_is_from_the_put_until_a_worker_took_it(self, clock, vcpus):
        tap = Hooked()
        backend = FakeBackend([vmcall(seq, seq % vcpus) for seq in range(1, 4)])
        await serve(backend, self.handler(clock, 7000), tap)
        assert [each.queued for each in tap.begun] == [0, 7000, 14000]
        assert [each.waited for each in tap.begun] == [0, 0, 0]

    async def test_has_the_wait_for_room_in_a_full_queue(self, clock):
        tap = Hooked()
        backend = FakeBackend([vmcall(seq, seq) for seq in (1, 2)])
        await serve(backend, self.handler(clock, 500), tap, queue=1)
        assert [each.queued for each in tap.begun] == [0, 500]

    async def test_of_a_trap_that_is_not_ours_is_not_given_to_the_next(self, clock):
        class Later(Hooked):
            def ran_natively(self, event, why):
                super().ran_natively(event, why)
                clock.now += 300

        tap = Later()
        backend = FakeBackend([vmcall(1, packet=NATIVE), vmcall(2)])
        await serve(backend, self.handler(clock, 0), tap)
        assert [(each.event.seq, each.queued) for each in tap.begun] == [(2, 300)]

    async def test_ends_where_the_wait_for_a_turn_begins(self, clock):
        class Serial(Steps):
            serial = True

            @method(2)
            async def linger(self, vmi, packet):
                self.began.set()
                await self.go_on.wait()
                clock.now += 9000
                return BridgeResponse(2)

        steps, tap = Serial(), Hooked()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vm.call, LINGER)
                await steps.began.wait()

                async def second():
                    await vm.call(COPY, vcpu=1)

                tasks.start_soon(second)
                while ("trap", 2) not in tap.calls:
                    await anyio.sleep(0)
                steps.go_on.set()

        await serve(FakeGuest(guest, memory=MEMORY), steps, tap)
        assert [(each.event.seq, each.queued, each.waited) for each in tap.begun] == [
            (1, 0, 0),
            (2, 0, 9000),
        ]

    async def test_is_forgotten_with_a_put_that_is_given_up(self, clock):
        lanes = queue_time.TimedLanes(1, lambda _: None, lambda: clock.now / 1e9)
        lanes.put_nowait(vmcall(1))
        with pytest.raises(anyio.WouldBlock):
            lanes.put_nowait(vmcall(2, 1))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await lanes.put(vmcall(2, 1))
        assert lanes.get_nowait().seq == 1
        clock.now += 100
        lanes.put_nowait(vmcall(2, 1))
        assert lanes.get_nowait().seq == 2
        assert lanes.queued == {0: 0, 1: 0}


class TestACancellation:
    async def test_of_a_run_is_answered_as_for_other_taps(self):
        tap, steps = Hooked(), Steps()

        async def guest(vm):
            await vm.call(LINGER)

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel():
                    await steps.began.wait()
                    scope.cancel()

                tasks.start_soon(cancel)
                await serve(FakeGuest(guest), steps, tap)
        assert tap.calls == [
            "begin",
            ("trap", 1),
            ("began", 1, "steps", "linger"),
            ("answered", 1, "cancelled", None),
            "end",
        ]

    async def test_while_it_waits_for_its_turn_no_handler_has_begun(self):
        class Serial(Steps):
            serial = True

        tap, steps = Hooked(), Serial()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in (0, 1):
                    tasks.start_soon(lambda vcpu=vcpu: vm.call(LINGER, vcpu=vcpu))

        async with FakeGuest(guest) as backend:
            server = BridgeServer(backend, Bridge(steps), taps=[tap])
            async with anyio.create_task_group() as tasks:

                async def stop():
                    while ("trap", 2) not in tap.calls:
                        await anyio.sleep(0)
                    server.stop(now=True)

                tasks.start_soon(stop)
                kinds = [each.kind async for each in server.run()]
        assert kinds == [OutcomeKind.CANCELLED] * 2
        assert [each.event.seq for each in tap.begun] == [1]
