"""The hooks of taps: what is told, in which order, and what it costs those that have none."""

import time

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
    Outcome,
    OutcomeKind,
    Policy,
    Registers,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.engine import beginnings, workers
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeBackend, FakeGuest
from vmibridge.vm.backend import SessionEventKind

pytestmark = pytest.mark.anyio

MAGIC, OTHER_MAGIC = 0x1234, 0x9999
MEMORY = {0x2000: bytes(range(16))}


class Steps(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.began = anyio.Event()
        self.go_on = anyio.Event()

    @method(1)
    async def copy(self, vmi, packet):
        await vmi.memory.write_physical(0x2008, await vmi.memory.read_physical(0x2000, 8))
        return BridgeResponse(packet.value1 + 1)

    @method(2)
    async def linger(self, vmi, packet):
        self.began.set()
        await self.go_on.wait()
        return BridgeResponse(2)

    @method(3, soft_timeout=0.005)
    async def slow(self, vmi, packet):
        await self.go_on.wait()
        return BridgeResponse(3)

    @method(4)
    async def end_slow(self, vmi, packet):
        self.go_on.set()
        return BridgeResponse(4)


COPY, LINGER, SLOW, END_SLOW = (BridgePacket(MAGIC, 1, code) for code in (1, 2, 3, 4))
NATIVE = BridgePacket(OTHER_MAGIC, 1, 1)


class Hooked(Tap):
    """Keeps what it is told, by the hooks and by the other calls."""

    def __init__(self):
        self.calls = []
        self.begun = []
        self.session = []
        self.missed = []

    def begin(self, vm, bridge, settings, stop):
        self.calls.append("begin")

    def trap(self, event):
        self.calls.append(("trap", event.seq))

    def retried(self, event, first):
        self.calls.append(("retried", event.seq, first))

    def read(self, event, address, size, data, error):
        self.calls.append(("read", event.seq))

    def wrote(self, event, address, data, error):
        self.calls.append(("wrote", event.seq))

    def answered(self, outcome):
        self.calls.append(("answered", outcome.event.seq, outcome.kind.value, outcome.retry_of))

    def end(self, vm, summary):
        self.calls.append("end")

    def handler_began(self, began):
        self.calls.append(("began", began.event.seq, began.handler, began.method))
        self.begun.append(began)

    def ran_natively(self, event, why):
        self.calls.append(("native", event.seq, why))

    def session_event(self, event):
        self.calls.append(("session", event.kind.value))
        self.session.append(event)

    def tap_lost(self, vm, tap, error):
        self.calls.append(("lost", type(tap).__name__, str(error)))

    def missed_traps(self, vm, count):
        self.missed.append((vm, count))


async def serve(backend, target, *taps, **options):
    """Run to the end: the outcomes."""
    bridge = target if isinstance(target, Bridge) else Bridge(target)
    async with backend:
        with anyio.fail_after(10):
            return [
                each async for each in BridgeServer(backend, bridge, taps=taps, **options).run()
            ]


class Clock:
    """Stands still unless a test moves it: the time in the queue, and since a trap was taken."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic_ns()
        monkeypatch.setattr(beginnings, "_clock", lambda: self.now)
        monkeypatch.setattr(workers, "_clock", lambda: self.now / 1e9)


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


def vmcall(seq, vcpu=0, packet=COPY):
    registers = Registers(rcx=packet.magic, rdx=packet.request | packet.method << 16)
    return TrapEvent(seq, TrapReason.VMCALL, registers, "fake", vcpu, length=3)


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
        lanes = beginnings.TimedLanes(1, lambda _: None)
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


# --- taps that raise --------------------------------------------------------------------


async def every_hook(vm):
    """Brings about a call of each hook but for `tap_lost`; then more traps."""
    await vm.call(COPY)
    await vm.call(NATIVE)
    vm.change_session(SessionEventKind.LOST, "a test")
    vm.results = [(await vm.call(BridgePacket(MAGIC, 1, 1, n))).rax for n in range(3)]


class Fault(Exception):
    pass


class Raises(Hooked):
    """Raises in one of its calls; must not be called again."""

    def __init__(self, where):
        super().__init__()

        def fail(*_):
            assert "raised" not in self.calls
            self.calls.append("raised")
            raise Fault(where)

        setattr(self, where, fail)

    def dropped(self, vm, error):
        self.calls.append("dropped")


class TestATapThatRaises:
    @pytest.mark.parametrize("where", ["handler_began", "ran_natively", "session_event"])
    async def test_in_a_hook_is_dropped_and_the_trap_goes_on(self, where, caplog):
        before, bad, after = Hooked(), Raises(where), Hooked()
        vm = FakeGuest(every_hook, memory=MEMORY)
        outcomes = await serve(vm, Steps(), before, bad, after)
        assert vm.results == [1, 2, 3]
        assert [each.kind for each in outcomes] == [OutcomeKind.HANDLED] * 4
        assert [each.getMessage() for each in caplog.records] == [
            f"vm fake: tap Raises is dropped: its {where}() raised Fault: {where}"
        ]
        assert bad.calls[-2:] == ["raised", "dropped"]
        assert before.calls == after.calls
        assert [each for each in after.calls if each[0] == "lost"] == [("lost", "Raises", where)]
        assert len(after.begun) == 4

    async def test_when_another_one_is_lost_is_dropped_too(self, caplog):
        """After the call that was under way: none is called again after it was dropped."""
        bad, worse, good = Raises("trap"), Raises("tap_lost"), Hooked()
        vm = FakeGuest(every_hook, memory=MEMORY)
        await serve(vm, Steps(), bad, worse, good)
        assert vm.results == [1, 2, 3]
        assert worse.calls == ["begin", ("trap", 1), "raised", "dropped"]
        lost = [each for each in good.calls if each[0] == "lost"]
        assert lost == [("lost", "Raises", "trap"), ("lost", "Raises", "tap_lost")]
        assert good.calls.index(("trap", 1)) < good.calls.index(lost[0])
        assert len(caplog.records) == 2

    @pytest.mark.parametrize(
        ("where", "missed"),
        [
            ("begin", 4),
            ("trap", 4),
            ("handler_began", 3),
            ("answered", 3),
            ("ran_natively", 3),
            ("session_event", 3),
            ("end", 0),
        ],
    )
    async def test_is_told_at_the_end_how_many_traps_it_missed(self, where, missed):
        tap, other = Raises(where), Hooked()
        await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), tap, other)
        assert tap.missed == [("fake", missed)]
        assert other.missed == []

    async def test_two_of_them_are_counted_apart(self):
        first, second = Raises("trap"), Raises("ran_natively")
        await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), first, second)
        assert (first.missed, second.missed) == ([("fake", 4)], [("fake", 3)])

    async def test_when_it_is_told_what_it_missed_harms_nobody(self, caplog):
        class Worse(Raises):
            def missed_traps(self, vm, count):
                raise Fault("again")

        bad, other = Worse("trap"), Raises("trap")
        await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), bad, other)
        assert other.missed == [("fake", 4)]
        assert len(caplog.records) == 2


class TestASession:
    async def test_is_told_between_begin_and_end(self):
        tap = Hooked()
        vm = FakeGuest(every_hook, memory=MEMORY)
        vm.change_session(SessionEventKind.CONNECTED)
        await serve(vm, Steps(), tap)
        vm.change_session(SessionEventKind.ENDED)
        (event,) = tap.session
        assert (event.vm, event.kind, event.reason) == ("fake", SessionEventKind.LOST, "a test")
        assert (tap.calls[0], tap.calls[-1]) == ("begin", "end")


# --- taps without hooks -----------------------------------------------------------------


class Plain:
    """As one written for 0.2.0, which had no hooks; it need not derive from `Tap`."""

    full = False

    def __init__(self):
        self.seen = []

    async def room(self):
        pass

    def begin(self, vm, bridge, settings, stop):
        self.seen.append("begin")

    def trap(self, event):
        self.seen.append("trap")

    def retried(self, event, first):
        self.seen.append("retried")

    def read(self, event, address, size, data, error):
        self.seen.append("read")

    def wrote(self, event, address, data, error):
        self.seen.append("wrote")

    def answered(self, outcome):
        self.seen.append("answered")

    def end(self, vm, summary):
        self.seen.append("end")


class NamesTaken(Plain):
    """Has attributes of its own under the names of hooks."""

    handler_began = 0
    session_event = None
    tap_lost = ()

    def __init__(self):
        super().__init__()
        self.ran_natively = {}
        self.missed_traps = 3


class Proxy:
    """Knows the older calls, and nothing else."""

    def __init__(self):
        self.tap = Plain()

    def __getattr__(self, name):
        return {each: getattr(self.tap, each) for each in (*vars(Plain), "seen")}[name]


class Derived(Plain, Tap):
    """As `Plain`, from `Tap`."""


@pytest.mark.parametrize("make", [Plain, Derived, NamesTaken, Proxy])
async def test_a_tap_that_is_older_than_the_hooks_works_as_before(make, caplog):
    tap, bad = make(), Raises("trap")
    vm = FakeGuest(every_hook, memory=MEMORY)
    await serve(vm, Steps(), bad, tap)
    assert vm.results == [1, 2, 3]
    assert tap.seen == ["begin", *["trap", "read", "wrote", "answered"] * 4, "end"]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("taps", [(), (Plain,), (Derived,), (Tap,)])
async def test_where_no_tap_has_a_hook_nothing_is_called_and_no_clock_is_read(taps, monkeypatch):
    def never(*_):
        raise AssertionError("it costs something")

    for place, name in (
        (beginnings, "_clock"),
        (beginnings, "TimedLanes"),
        (beginnings, "Beginnings"),
    ):
        monkeypatch.setattr(place, name, never)
    vm = FakeGuest(every_hook, memory=MEMORY)
    await serve(vm, Steps(), *(make() for make in taps))
    assert vm.results == [1, 2, 3]
    assert vm.on_session_event is None


async def test_a_tap_with_another_hook_does_not_time_the_queue(monkeypatch):
    class Natives(Tap):
        seen = 0

        def ran_natively(self, event, why):
            self.seen += 1

    def never():
        raise AssertionError("it costs something")

    monkeypatch.setattr(beginnings, "_clock", never)
    tap = Natives()
    await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), tap)
    assert tap.seen == 1


async def test_a_hook_that_an_instance_has_of_its_own_is_one():
    tap, begun = Tap(), []
    tap.handler_began = begun.append
    await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), tap)
    assert [each.method for each in begun] == ["copy"] * 4
