"""Taps cannot hurt: one that raises is dropped, and the run is as if it had not been there."""

import logging

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
)
from vmibridge.engine.taps import Tap
from vmibridge.errors import RecordingError
from vmibridge.recording import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234
MEMORY = {0x2000: bytes(range(16))}
CALLS = ("begin", "trap", "retried", "read", "wrote", "answered", "end")


class Asked(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.late = anyio.Event()

    @method(1)
    async def copy(self, vmi, packet):
        await vmi.memory.write_physical(0x2008, await vmi.memory.read_physical(0x2000, 8))
        return BridgeResponse(packet.value1 + 1)

    @method(2, soft_timeout=0.005)
    async def slow(self, vmi, packet):
        await self.late.wait()
        return BridgeResponse(7)

    @method(4)
    async def end_slow(self, vmi, packet):
        self.late.set()
        return BridgeResponse(4)


async def guest(vm):
    """Takes each of the calls of a tap."""
    vm.results = [(await vm.call(BridgePacket(MAGIC, 1, 1, n))).rax for n in range(3)]
    vm.results.append((await vm.call(BridgePacket(MAGIC, 1, 2))).rax)
    vm.results.append((await vm.call(BridgePacket(MAGIC, 1, 4))).rax)
    vm.results.append((await vm.call(BridgePacket(MAGIC, 1, 2))).rax)


RESULTS = [1, 2, 3, Gate.WAIT, 4, 7]


class Counts(Tap):
    """Counts its calls."""

    def __init__(self):
        self.counts = dict.fromkeys(CALLS, 0)
        self.dropped_by = []
        for name in CALLS:
            setattr(self, name, self._counter(name))

    def _counter(self, name):
        def call(*_):
            self.counts[name] += 1

        return call

    def dropped(self, vm, error):
        self.dropped_by.append((vm, error))

    @property
    def total(self):
        return sum(self.counts.values())


class Fault(Exception):
    pass


class Raises(Counts):
    """Raises in one of its calls, from the first time on."""

    def __init__(self, where):
        super().__init__()
        self.after = None

        def fail(*_):
            assert self.after is None, "it was called again"
            self.after = self.total
            raise Fault(f"in\n{where}")

        setattr(self, where, fail)


class FullRaises(Counts):
    """Raises when it is asked whether it is full."""

    @property
    def full(self):
        raise Fault("full")


class RoomRaises(Counts):
    """Is full from its first answer on, and raises when it is waited for."""

    def __init__(self):
        super().__init__()
        self.answered = self._fill

    def _fill(self, outcome):
        self.full = True

    async def room(self):
        await anyio.sleep(0)
        raise Fault("room")


async def serve(*taps, log, vms=1):
    """Run to the end; the results of the guest, and the errors in the log."""
    async with FakeGuest(guest, memory=MEMORY) as vm:
        server = BridgeServer(vm, Bridge(Asked()), taps=taps)
        with anyio.fail_after(10):
            outcomes = [outcome async for outcome in server.run()]
    assert server.summary.outcomes[OutcomeKind.HANDLED] == 5
    assert server.summary.total == len(outcomes)
    errors = [each.getMessage() for each in log.records if each.levelno >= logging.WARNING]
    return vm.results, errors


@pytest.mark.parametrize("where", CALLS)
async def test_one_that_raises_is_dropped_and_the_run_goes_on(where, caplog):
    before, bad, after = Counts(), Raises(where), Counts()
    results, errors = await serve(before, bad, after, log=caplog)
    assert results == RESULTS
    assert errors == [
        f"vm fake: tap Raises is dropped: its {where}() raised Fault: in\\n{where}",
    ]
    # It sees nothing more, the others see all of it.
    assert bad.total == bad.after
    assert before.counts == after.counts
    assert all(before.counts.values())
    assert [(vm, type(error)) for vm, error in bad.dropped_by] == [("fake", Fault)]


@pytest.mark.parametrize("bad", [FullRaises, RoomRaises])
async def test_so_is_one_that_raises_when_it_is_waited_for(bad, caplog):
    tap, other = bad(), Counts()
    results, errors = await serve(tap, other, log=caplog)
    assert results == RESULTS
    assert len(errors) == 1
    assert f"tap {bad.__name__} is dropped" in errors[0]
    assert len(tap.dropped_by) == 1
    assert all(other.counts.values())


async def test_nobody_waits_for_the_room_of_one_that_was_dropped(caplog):
    class NeverHasRoom(Counts):
        """Full for the first vCPU, for ever; raises at the trap of the second."""

        full = True

        def __init__(self):
            super().__init__()
            self.waited_for = anyio.Event()
            self.trap = self._trap

        def _trap(self, event):
            if event.vcpu == 1:
                raise Fault("trap")

        async def room(self):
            self.waited_for.set()
            await anyio.sleep_forever()

    tap = NeverHasRoom()

    async def two_vcpus(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, BridgePacket(MAGIC, 1, 3))
            await tap.waited_for.wait()
            await vm.call(BridgePacket(MAGIC, 1, 3), vcpu=1)

    async with FakeGuest(two_vcpus) as vm:
        server = BridgeServer(vm, Bridge(Asked()), taps=[tap])
        with anyio.fail_after(10):
            kinds = [outcome.kind async for outcome in server.run()]
    assert kinds == [OutcomeKind.REJECTED] * 2
    assert len(caplog.records) == 1


async def test_one_that_raises_when_it_is_dropped_is_dropped_all_the_same(caplog):
    class Worse(Raises):
        def dropped(self, vm, error):
            raise Fault("again")

    results, errors = await serve(Worse("trap"), log=caplog)
    assert results == RESULTS
    assert len(errors) == 1


async def test_other_vms_keep_it(caplog):
    class OneVm(Counts):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.trap = self._trap

        def _trap(self, event):
            if event.vm == "a":
                raise Fault("trap")
            self.seen.append(event.vm)

    tap = OneVm()
    async with (
        FakeGuest(guest, memory=MEMORY, vm="a") as a,
        FakeGuest(guest, memory=MEMORY, vm="b") as b,
    ):
        server = BridgeServer([a, b], lambda vm: Bridge(Asked()), taps=[tap])
        async for _ in server.run():
            pass
    assert a.results == b.results == RESULTS
    assert len(tap.seen) == server.summaries["b"].total
    assert len(caplog.records) == 1


# --- those that end a run on purpose ----------------------------------------------------


class Unwritable(Recorder):
    """A recorder that cannot take the third trap."""

    def trap(self, event):
        if event.seq == 3:
            raise Fault("unheard of")
        super().trap(event)


async def test_a_recorder_that_raises_stops_the_run_as_if_it_could_not_write(tmp_path):
    path = tmp_path / "run.mcap"
    handled = 0
    with pytest.raises(RecordingError, match="the recording ends here: Fault: unheard of"):
        async with Unwritable(path) as recorder, FakeGuest(guest, memory=MEMORY) as vm:
            async for outcome in BridgeServer(vm, Bridge(Asked()), taps=[recorder]).run():
                handled += outcome.kind is OutcomeKind.HANDLED
    # What was taken is answered.
    assert handled >= 2
    assert len(vm.writes) == len(vm.events)


async def test_or_lets_it_go_on(tmp_path, caplog):
    async with Unwritable(tmp_path / "run.mcap", on_error="continue") as recorder:
        results, errors = await serve(recorder, log=caplog)
    assert results == RESULTS
    assert [error for error in errors if "the run continues without a recording" in error]


async def test_a_replay_that_cannot_go_on_ends_with_its_error(tmp_path):
    path = tmp_path / "run.mcap"
    async with Recorder(path) as recorder, FakeGuest(guest, memory=MEMORY) as vm:
        async for _ in BridgeServer(vm, Bridge(Asked()), taps=[recorder]).run():
            pass

    class Differs(Asked):
        @method(1)
        async def copy(self, vmi, packet):
            return BridgeResponse(99)

    def tell(difference):
        raise BrokenPipeError("nobody reads on")

    async with ReplayBackend(path, on_difference=tell) as backend:
        with anyio.fail_after(10), pytest.raises(BrokenPipeError):
            async for _ in BridgeServer(backend, Bridge(Differs())).run():
                pass
