"""A volume that is full: guests are held and nothing is lost, or they go on and the gap is told.

When there is room again, the recording goes on by itself.
"""

import logging
from functools import partial

import anyio
import pytest
from recorder_parts import Probe, ask, calls, serve
from waiting import until

from vmibridge import Bridge, BridgeResponse, BridgeServer, method
from vmibridge.engine.taps import Hindrance
from vmibridge.errors import RecordingError, ServerStateError
from vmibridge.recording import (
    Note,
    Recorder,
    RecordingReader,
    ReplayBackend,
    chunked,
    recorded_traps,
)
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

CALLS = 300
PLENTY = 1 << 30
ROOMS = pytest.mark.parametrize("room", [0, 700, 5000])


@pytest.fixture(autouse=True)
def tries_often(monkeypatch):
    monkeypatch.setattr(chunked, "_AGAIN", 0.005)


def parts_of(folder):
    return sorted(folder.glob("*.mcap"), key=lambda each: (len(each.name), each.name))


def messages_of(path):
    """All of a file, which is whole."""
    with RecordingReader(path) as reader:
        found = [message for _, message in reader.messages()]
        assert (reader.problems, reader.complete) == ([], True), path
    return found


def traps_of(path):
    with RecordingReader(path) as reader:
        return list(recorded_traps(reader.messages()))


async def replayed(path, handler=None):
    async with ReplayBackend(path) as backend:
        async for _ in BridgeServer(backend, Bridge(handler or Probe())).run():
            pass
    return backend.result


class Run:
    """A guest of many calls beside the test, recorded into `path`."""

    def __init__(self, path, guest=None, *, bridge=None, **options):
        self.recorder = Recorder(path, flush_traps=8, **options)
        self.vm = FakeGuest(guest or calls(CALLS), memory={0x2000: bytes(8)})
        bridge = bridge or Bridge(Probe())
        self.server = BridgeServer(self.vm, bridge, taps=[self.recorder], timeout=60)
        self.answered = 0
        self.error = None
        self.ended = anyio.Event()

    async def __call__(self, *, task_status=anyio.TASK_STATUS_IGNORED):
        try:
            async with self.recorder, self.vm:
                task_status.started()
                async for _ in self.server.run():
                    self.answered += 1
        except RecordingError as error:
            self.error = error
        self.ended.set()


class Held(Probe):
    """Requests of method 9 wait, each for an event of its own, between two reads of memory."""

    def __init__(self, answers=False):
        self.begun = [anyio.Event() for _ in range(3)]
        self.go_on = [anyio.Event() for _ in range(3)]
        self.waits = set()
        for each in self.go_on if answers else ():
            each.set()

    @method(9)
    async def hold(self, vmi, packet):
        await vmi.memory.read(0x2000, 8)
        self.waits.add(packet.value1)
        await self.go_on[packet.value1].wait()
        await vmi.memory.read(0x2000, 8)
        return BridgeResponse(packet.value1)


class TestHolds:
    @ROOMS
    async def test_the_guest_until_there_is_room_and_loses_nothing(self, path, disk, room, caplog):
        run = Run(path)
        with caplog.at_level(logging.WARNING, "vmibridge.recording"), anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                disk.room = room
                await until(lambda: run.recorder.full and run.recorder.hindrance)
                held = run.server.summary.total
                # It tries again and again meanwhile.
                for _ in range(5):
                    await anyio.sleep(0.01)
                assert held <= run.server.summary.total <= held + 1 < CALLS
                why = f"{path}: No space left on device"
                assert run.server.hindrance == Hindrance("disk full", why, holds_guests=True)
                disk.room = PLENTY
        assert (run.error, run.recorder.lost, run.server.hindrance) == (None, 0, None)
        assert [trap.event.seq for trap in traps_of(path)] == list(range(1, CALLS + 1))
        assert messages_of(path)
        full, again = caplog.messages
        assert full == f"{why}: the guests are held until there is room"
        assert again.startswith(f"{path}: there is room again, after ")
        assert again.endswith(": nothing is missing, the guests go on")

    @ROOMS
    async def test_no_longer_than_until_a_stop(self, path, disk, room):
        run = Run(path)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                disk.room = room
                await until(lambda: run.recorder.full and run.recorder.hindrance)
                run.server.stop(now=True)
        assert "the recording ends here: No space left on device" in str(run.error)
        assert run.recorder.hindrance.kind == "not recording"
        assert run.server.summary.total < CALLS
        with RecordingReader(path) as reader:
            kept = len(list(recorded_traps(reader.messages())))
        assert kept + run.recorder.lost == run.server.summary.total

    async def test_it_from_the_start_where_no_file_can_be_made(self, tmp_path, disk):
        disk.room = 0
        run = Run(tmp_path)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                await until(lambda: run.answered or run.recorder.full)
                assert parts_of(tmp_path) == []
                assert run.server.hindrance.kind == "disk full"
                disk.room = PLENTY
        (part,) = parts_of(tmp_path)
        assert [trap.event.seq for trap in traps_of(part)] == list(range(1, CALLS + 1))

    async def test_a_vcpu_each_and_all_of_them_go_on(self, path, disk):
        async def guest(vm):
            async def vcpu(number):
                for value in range(60):
                    await vm.call(ask(1, value), vcpu=number)

            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(vcpu, number)

        run = Run(path, guest)
        async with anyio.create_task_group() as tasks:
            await tasks.start(run)
            disk.room = 600
            await until(lambda: run.recorder.hindrance)
            disk.room = PLENTY
        assert len(traps_of(path)) == 240
        assert (run.recorder.lost, run.error) == (0, None)


class TestGoesOn:
    @ROOMS
    async def test_and_the_gap_is_in_the_recording_the_summary_and_the_log(
        self, tmp_path, disk, room, caplog
    ):
        go_on = anyio.Event()

        async def guest(vm):
            for number in range(CALLS):
                await vm.call(ask(1, number))
            await go_on.wait()
            for number in range(50):
                await vm.call(ask(1, number))

        run = Run(tmp_path, guest, on_error="continue")
        with caplog.at_level(logging.WARNING, "vmibridge.recording"), anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                disk.room = room
                await until(lambda: run.answered == CALLS and run.recorder.hindrance)
                assert run.server.hindrance.holds_guests is False
                disk.room = PLENTY
                await until(lambda: run.recorder.hindrance is None)
                go_on.set()
        before, behind = parts_of(tmp_path)
        lost = run.recorder.lost
        assert lost > 0
        assert run.server.summary.unrecorded == lost
        # Both are whole, and what is behind the gap replays by itself.
        messages_of(before)
        told = f"the volume was full: {lost} traps were not recorded before this"
        notes = [each for each in messages_of(behind) if isinstance(each, Note)]
        assert notes[0] == Note("lost", told, "fake")
        kept = [trap.event.seq for part in (before, behind) for trap in traps_of(part)]
        assert len(kept) + lost == CALLS + 50
        assert kept[-50:] == list(range(CALLS + 1, CALLS + 51))
        result = await replayed(behind)
        assert (result.compared, result.different) == (50, 0)
        full, again, end = caplog.messages
        assert full.endswith(
            "No space left on device; the run continues without a recording, until there is room"
        )
        assert again.endswith(f"; {lost} traps were not recorded")
        assert end == f"{behind}: has a gap; {lost} traps were not recorded"

    async def test_with_requests_that_are_open_at_both_ends_of_the_gap(self, tmp_path, disk):
        held = Held()
        ended = anyio.Event()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for number in range(3):
                    await held.begun[number].wait()
                    tasks.start_soon(partial(vm.call, ask(9, number), vcpu=number + 1))
                for number in range(CALLS):
                    await vm.call(ask(1, number))
                await ended.wait()

        run = Run(tmp_path, guest, bridge=Bridge(held), on_error="continue", flush_interval=0.01)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                # The first began before the gap and ends in it, the second goes on behind it; the
                # third begins in it.
                held.begun[0].set()
                held.begun[1].set()
                await until(lambda: held.waits == {0, 1} and not run.recorder._unwritten)
                disk.room = 0
                held.begun[2].set()
                await until(lambda: run.recorder.hindrance and held.waits == {0, 1, 2})
                held.go_on[0].set()
                await until(lambda: run.server.summary.total == CALLS + 1)
                disk.room = PLENTY
                await until(lambda: run.recorder.hindrance is None)
                held.go_on[1].set()
                held.go_on[2].set()
                ended.set()
        before, behind = parts_of(tmp_path)
        messages_of(before)
        messages_of(behind)
        left = {trap.event.vcpu: trap for trap in traps_of(behind)}
        assert set(left) == {2, 3}, "those that were open when it went on"
        assert all(trap.notes[0][1].kind == "lost" for trap in left.values())
        result = await replayed(behind, Held(answers=True))
        assert (result.compared, result.different) == (0, 0)

    async def test_without_room_to_its_end(self, path, disk):
        disk.room = 2000
        recorder = Recorder(path, on_error="continue", flush_traps=8)
        with anyio.fail_after(60):
            async with recorder, FakeGuest(calls(CALLS)) as vm:
                outcomes, server = await serve(vm, recorder)
        assert len(outcomes) == CALLS
        with RecordingReader(path) as reader:
            assert len(list(recorded_traps(reader.messages()))) + recorder.lost == CALLS
        assert server.summary.unrecorded + recorder.lost_since(vm.vm) == recorder.lost


class TestStops:
    """While the guests are held: what has no room by then is lost, and counted."""

    @ROOMS
    @pytest.mark.parametrize("options", [{}, {"max_size": 1 << 20}], ids=["one file", "files"])
    async def test_what_was_answered_and_is_not_written_is_counted(
        self, path, disk, room, options, caplog
    ):
        disk.room = room
        run = Run(path, **options)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                await until(lambda: is_begun(run.server) and run.recorder.hindrance)
                run.server.stop()
        total, vm = run.server.summary.total, run.vm.vm
        written = len(traps_of(path)) if path.exists() and path.stat().st_size else 0
        assert run.recorder.lost == total - written > 0
        assert run.server.summary.unrecorded + run.recorder.lost_since(vm) == run.recorder.lost
        assert "the recording ends here: " in str(run.error)
        assert f"; {run.recorder.lost} trap" in caplog.text

    async def test_that_of_each_vm_by_itself_and_before_the_block_is_left(self, path, disk):
        """Of one recorder for two VMs; one comes before the other."""
        first, second = FakeGuest(calls(3), vm="first"), FakeGuest(calls(CALLS), vm="second")
        recorder = Recorder(path, flush_traps=8)
        disk.room = 0
        with anyio.fail_after(60), pytest.raises(RecordingError):
            async with recorder, first, second:
                server = BridgeServer([first, second], lambda _: Probe(), taps=[recorder])
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(served_to_its_end, server)
                    await until(lambda: is_begun(server) and recorder.hindrance)
                    server.stop()
                await recorder.finish()
                lost = recorder.lost
                of_each = {vm: recorder.lost_since(vm) for vm in server.summaries}
                await recorder.finish()
                assert (recorder.lost, sum(of_each.values())) == (lost, lost)
        assert of_each == {vm: each.total for vm, each in server.summaries.items()}
        assert recorder.lost == lost

    async def test_a_recording_that_is_finished_early_is_whole(self, path):
        recorder = Recorder(path, flush_interval=1000)
        async with recorder, FakeGuest(calls(5)) as vm:
            await serve(vm, recorder)
            await recorder.finish()
            assert len(traps_of(path)) == 5
            messages_of(path)
        messages_of(path)
        assert recorder.lost_since(vm.vm) == 0


def is_begun(server):
    """Whether each VM has a trap."""
    try:
        return all(each.total for each in server.summaries.values())
    except ServerStateError:
        return False


async def served_to_its_end(server):
    async for _ in server.run():
        pass
