"""A tap that raises, and taps that are older than the hooks, or have none."""

import asyncio
from typing import ClassVar

import pytest
from hooked_taps import COPY, MAGIC, MEMORY, NATIVE, Hooked, Steps, serve

from vmibridge import (
    BridgePacket,
    OutcomeKind,
)
from vmibridge.bridge.dispatch import one_line
from vmibridge.engine import queue_time
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeGuest
from vmibridge.vm.backend import SessionEventKind

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)


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


class TestATapThatRaisesWhatIsNoException:
    """Such as the `result()` of a future that was cancelled."""

    RAISED: ClassVar = [
        SystemExit(3),
        asyncio.CancelledError(),
        GeneratorExit(),
        BaseExceptionGroup("group", [SystemExit(3)]),
        type("Own", (BaseException,), {})(),
    ]

    WHERE: ClassVar = [
        *("machine", "begin", "trap", "taken_at", "read", "handler_began", "answered"),
        *("ran_natively", "session_event", "end"),
    ]

    @pytest.mark.parametrize("where", WHERE)
    async def test_is_dropped_as_by_any_other(self, where):
        for error in self.RAISED:

            def fail(*_, error=error):
                raise error

            bad, good = Hooked(), Hooked()
            setattr(bad, where, fail)
            vm = FakeGuest(every_hook, memory=MEMORY)
            outcomes = await serve(vm, Steps(), bad, good)
            assert vm.results == [1, 2, 3]
            assert [each.kind for each in outcomes] == [OutcomeKind.HANDLED] * 4
            assert good.calls[-1] == "end" or where == "end"
            assert ("lost", "Hooked", one_line(error)) in good.calls

    async def test_and_by_a_flag_that_is_neither_true_nor_false(self):
        class Neither:
            def __bool__(self):
                raise Fault("neither")

        bad, good = Hooked(), Hooked()
        bad.full = Neither()
        vm = FakeGuest(every_hook, memory=MEMORY)
        await serve(vm, Steps(), bad, good)
        assert vm.results == [1, 2, 3]
        assert ("lost", "Hooked", "neither") in good.calls

    @on_asyncio
    async def test_and_by_a_room_that_waits_for_what_was_cancelled(self):
        waited_for = asyncio.get_running_loop().create_future()
        waited_for.cancel()

        class Full(Hooked):
            full = True

            async def room(self):
                await waited_for

        bad, good = Full(), Hooked()
        vm = FakeGuest(every_hook, memory=MEMORY)
        await serve(vm, Steps(), bad, good)
        assert vm.results == [1, 2, 3]
        assert ("lost", "Full", "CancelledError: ") in good.calls


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
        (queue_time, "TimedLanes"),
        (queue_time, "Beginnings"),
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

    def never(*_):
        raise AssertionError("it costs something")

    monkeypatch.setattr(queue_time, "TimedLanes", never)
    tap = Natives()
    await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), tap)
    assert tap.seen == 1


async def test_a_hook_that_an_instance_has_of_its_own_is_one():
    tap, begun = Tap(), []
    tap.handler_began = begun.append
    await serve(FakeGuest(every_hook, memory=MEMORY), Steps(), tap)
    assert [each.method for each in begun] == ["copy"] * 4
