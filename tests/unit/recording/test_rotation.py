"""A recording that goes on in another file: each part is one by itself, and none is too large."""

import logging
import os
import threading
from collections import Counter
from functools import partial

import anyio
import pytest
from recorder_parts import read
from waiting import until

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, method
from vmibridge.recording import (
    Note,
    Recorder,
    RecordingReader,
    ReplayBackend,
    Reply,
    Session,
    chunked,
    rotation,
)
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import Step
from vmibridge.recording.replay.options import BEFORE
from vmibridge.recording.rotation import MIN_SIZE
from vmibridge.recording.traps import recorded_traps
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]

MAGIC = 0x1234
MANY = 1500
LARGE = 3 * MIN_SIZE
NOISE = os.urandom(LARGE)
"""What no compression makes smaller."""
MEMORY = {0x10_0000: NOISE, 0x1000: bytes(4096)}


class Answers(BridgeHandler[object]):
    MAGIC, REQUEST = MAGIC, 1
    name = "answers"

    def __init__(self):
        self.go_on = anyio.Event()

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(packet.value1 + 1).with_output("x" * 100)

    @method(2)
    async def large(self, vmi, packet):
        data = await vmi.memory.read(0x10_0000, packet.value1)
        return BridgeResponse(len(data))

    @method(3)
    async def held(self, vmi, packet):
        await vmi.memory.read(0x1000, 8)
        await self.go_on.wait()
        await vmi.memory.read(0x1008, 8)
        return BridgeResponse(7)

    @method(4, soft_timeout=0.01)
    async def slow(self, vmi, packet):
        await vmi.memory.read(0x1000, 8)
        await self.go_on.wait()
        return BridgeResponse(8)

    @method(5)
    async def pages(self, vmi, packet):
        for number in range(packet.value1):
            await vmi.memory.read(0x10_0000 + 4096 * number, 4096)
        return BridgeResponse(9)


def ask(code, value=0):
    return BridgePacket(MAGIC, 1, code, value)


async def record(path, guest, *, handler=None, vms=("fake",), **options):
    """Run it, recorded with the least size of a file; returns the parts that there are."""
    async with Recorder(path, **{"max_size": MIN_SIZE, **options}) as recorder:
        for vm in vms:
            async with FakeGuest(guest, memory=MEMORY, vm=vm) as backend:
                bridge = Bridge(handler or Answers())
                async for _ in BridgeServer(backend, bridge, taps=[recorder], timeout=60).run():
                    pass
    return parts_of(path if path.is_dir() else path.parent)


def parts_of(folder):
    return sorted(folder.glob("*.mcap"), key=lambda each: (len(each.name), each.name))


async def calls(vm, count=MANY):
    for number in range(count):
        await vm.call(ask(1, number))


def traps_of(path):
    with RecordingReader(path) as reader:
        return list(recorded_traps(reader.messages()))


async def replayed(path, handler=None, **options):
    handler = handler or Answers()
    handler.go_on.set()
    async with ReplayBackend(path) as backend:
        async for _ in BridgeServer(backend, Bridge(handler), timeout=60, **options).run():
            pass
    return backend.result


class Beside(Answers):
    @method(6)
    async def reads_beside(self, vmi, packet):
        async def read():
            await self.go_on.wait()
            await vmi.memory.read(0x10_0000, MIN_SIZE)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
        return BridgeResponse(6)


async def test_a_part_begins_with_its_session_also_where_a_handler_has_just_lined_up(path):
    handler = Beside()

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, ask(6))
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(partial(vm.call, ask(1), vcpu=1))
            await anyio.wait_all_tasks_blocked()
            # Nothing is recorded since the second one was queued.
            handler.go_on.set()

    async with (
        # One that wakes in step with what looks whether tasks are blocked is never seen so.
        Recorder(path, max_size=MIN_SIZE, flush_interval=60) as recorder,
        FakeGuest(guest, memory=MEMORY) as backend,
    ):
        server = BridgeServer(backend, Bridge(handler), taps=[recorder], in_flight=1, timeout=60)
        async for _ in server.run():
            pass
    first, second, *_ = [read(part) for part in parts_of(path.parent)]
    assert first[-1] == Step("fake", 2, "queued")
    assert isinstance(second[0], Session)


class TestEachPart:
    async def test_is_whole_and_of_its_size_and_together_they_have_all(self, path):
        parts = await record(path, calls)
        assert len(parts) > 3
        assert all(part.stat().st_size <= MIN_SIZE for part in parts)
        seqs = []
        for number, part in enumerate(parts, 1):
            first, *messages = read(part)
            assert isinstance(first, Session)
            assert (first.part, first.vm) == (number, "fake")
            assert [each.name for each in first.handlers] == ["answers"]
            kinds = [type(each) for each in messages if not isinstance(each, Note)]
            assert kinds == [TrapEvent, Reply] * (len(kinds) // 2)
            seqs += [each.seq for each in messages if isinstance(each, TrapEvent)]
        assert seqs == list(range(1, MANY + 1))
        notes = [(part.name, note.kind) for part in parts for note in read(part, Note)]
        assert notes == [(parts[-1].name, "end")]

    async def test_is_replayed_by_itself(self, path):
        parts = await record(path, calls)
        results = [await replayed(part) for part in parts]
        assert sum(result.compared for result in results) == MANY
        assert not any(result.different or result.unchecked for result in results)

    async def test_has_the_sessions_of_the_vms_that_run_alone(self, path):
        parts = await record(path, calls, vms=("a", "b"))
        vms = [{each.vm for each in read(part, Session)} for part in parts]
        assert vms[0] == {"a"}
        assert vms[-1] == {"b"}
        assert {"a", "b"} in vms, "where one ended and the other began"

    async def test_of_a_redacted_recording_is_redacted(self, path):
        parts = await record(path, calls, redact=["value1"])
        for part in parts:
            assert read(part, Session)[0].redaction
            assert {trap.packet.value1 for trap in traps_of(part)} == {0}


async def test_an_empty_one_is_smaller_than_what_is_set_aside(path):
    async with Recorder(path):
        pass
    assert path.stat().st_size < rotation._FIXED < MIN_SIZE // 2


class TestTheirNames:
    async def test_follow_a_file_that_is_named_and_leave_what_is_there(self, path):
        path.with_name("run-2.mcap").write_text("something dear")
        await record(path, calls)
        names = [part.name for part in parts_of(path.parent)]
        assert names[:4] == ["run.mcap", "run-2.mcap", "run-3.mcap", "run-4.mcap"]
        assert path.with_name("run-2.mcap").read_text() == "something dear"

    async def test_are_numbered_on_in_a_folder(self, tmp_path):
        (tmp_path / "run-4.mcap").write_text("something dear")
        (tmp_path / "run-1000000000000.mcap").write_text("no number of ours")
        parts = await record(tmp_path, calls)
        names = [part.name for part in parts]
        assert names[:3] == ["run-4.mcap", "run-5.mcap", "run-6.mcap"]

    async def test_are_told(self, path, caplog):
        with caplog.at_level(logging.INFO, "vmibridge.recording"):
            parts = await record(path, calls)
        told = [text.split(": ") for text in caplog.messages]
        assert [each[0] for each in told] == [str(part) for part in parts]
        assert told[0][1].endswith(f" traps were recorded; it goes on in {parts[1]}")
        assert sum(int(each[1].split()[0]) for each in told) == MANY


class TestWhatIsOpenAtASplit:
    async def open_while(self, path, code, handler=None):
        """One vCPU has a request open, until another one has made several parts."""
        handler = handler or Answers()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.ask_until_answered, vm, ask(code))
                await until(lambda: vm.events)
                for number in range(MANY):
                    await vm.call(ask(1, number), vcpu=1)
                handler.go_on.set()

        return await record(path, guest, handler=handler)

    async def ask_until_answered(self, vm, packet):
        while (await vm.call(packet)).rax not in (7, 8):
            await anyio.sleep(0.001)

    async def test_is_in_both_files_and_compared_in_neither(self, path):
        parts = await self.open_while(path, 3)
        assert len(parts) > 3
        assert all(part.stat().st_size <= MIN_SIZE for part in parts)
        held = [next(trap for trap in traps_of(part) if trap.packet.method == 3) for part in parts]
        assert {trap.event.seq for trap in held} == {1}
        assert [trap.reply is None for trap in held] == [True] * (len(parts) - 1) + [False]
        assert [len(trap.accesses) for trap in held] == [1, *[0] * (len(parts) - 2), 1]
        for number, part in enumerate(parts[1:], 2):
            (note,) = (each for each in read(part, Note) if each.kind == "lost")
            assert (note.vm, note.seq) == ("fake", 1)
            assert note.text == f"trap 1 was taken in the file before this one, part {number - 1}"
        results = [await replayed(part) for part in parts]
        assert sum(result.compared for result in results) == MANY
        assert not any(result.different for result in results)
        reasons = Counter(why for result in results for why in result.unchecked)
        assert reasons == {"the recording ends before its answer": 1, BEFORE: len(parts) - 1}
        assert all(sum(result.unchecked.values()) == 1 for result in results)

    async def test_is_left_out_with_its_retries_where_it_was_told_to_wait(self, path):
        parts = await self.open_while(path, 4)
        assert len(parts) > 3
        results = [await replayed(part) for part in parts]
        assert sum(result.compared for result in results) == MANY
        assert not any(result.different for result in results)
        every = [trap for part in parts for trap in traps_of(part)]
        assert {trap.event.seq for trap in every} == set(
            range(1, max(trap.event.seq for trap in every) + 1)
        )
        assert [t.reply.kind.value for t in every if t.packet.method == 4 and t.reply][
            -1
        ] == "handled"

    async def test_is_not_split_where_the_guest_waits_for_nothing(self, path):
        async def guest(vm):
            for number in range(MANY):
                async with anyio.create_task_group() as tasks:
                    for vcpu in range(2):
                        tasks.start_soon(self.one, vm, number, vcpu)

        parts = await record(path, guest)
        assert len(parts) > 3
        assert [note.kind for part in parts for note in read(part, Note)] == ["end"]

    async def one(self, vm, number, vcpu):
        await vm.call(ask(1, number), vcpu=vcpu)


class TestAFlood:
    async def test_within_one_request_is_split_too(self, path):
        parts = await record(path, lambda vm: vm.call(ask(5, LARGE // 4096)))
        assert len(parts) > 3
        assert all(part.stat().st_size <= MIN_SIZE for part in parts)
        accesses = [access for part in parts for trap in traps_of(part) for access in trap.accesses]
        assert b"".join(each.data for each in accesses) == NOISE[: LARGE // 4096 * 4096]

    async def test_of_one_access_has_a_file_that_holds_it(self, path):
        async def guest(vm):
            await vm.call(ask(1))
            await vm.call(ask(2, LARGE))
            await vm.call(ask(1))

        parts = await record(path, guest)
        sizes = [part.stat().st_size for part in parts]
        assert [size > LARGE for size in sizes] == [size > MIN_SIZE for size in sizes]
        assert sum(size > MIN_SIZE for size in sizes) == 1
        held = [access for part in parts for trap in traps_of(part) for access in trap.accesses]
        assert [len(access.data) for access in held] == [LARGE]

    async def test_that_the_disk_does_not_take_for_a_while_makes_no_file_too_large(
        self, path, monkeypatch
    ):
        go_on, add = threading.Event(), RecordingWriter.add

        def held(writer, chunk):
            assert go_on.wait(60)
            add(writer, chunk)

        async def guest(vm):
            await vm.call(ask(5, LARGE // 4096))
            go_on.set()

        monkeypatch.setattr(RecordingWriter, "add", held)
        parts = await record(path, guest)
        assert len(parts) > 3
        assert all(part.stat().st_size <= MIN_SIZE for part in parts)


class TestADiskThatIsFullAtTheSplit:
    @pytest.fixture(params=["index", "next"])
    def full(self, request, disk, monkeypatch):
        """It is full when the first index is written, or right after that."""
        monkeypatch.setattr(chunked, "_AGAIN", 0.005)
        finish, tried = RecordingWriter.finish, []

        def full(writer):
            tried.append(writer)
            if len(tried) == 1 and request.param == "index":
                disk.room = 100
            finish(writer)
            if len(tried) == 1 and request.param == "next":
                disk.room = 100

        monkeypatch.setattr(RecordingWriter, "finish", full)

    async def run(self, tmp_path, disk, **options):
        """There is room again when it has been found full; returns its parts, which are whole."""
        self.taken = 0
        self.recorder = Recorder(tmp_path, max_size=MIN_SIZE, **options)

        async def make_room():
            await until(lambda: self.recorder.hindrance)
            disk.room = 1 << 30

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks, self.recorder:
                tasks.start_soon(make_room)
                async with FakeGuest(calls) as vm:
                    async for _ in BridgeServer(vm, Answers(), taps=[self.recorder]).run():
                        self.taken += 1
        parts = parts_of(tmp_path)
        for number, part in enumerate(parts, 1):
            sessions = {session.part for session in read(part, Session)}
            assert sessions == {number}
            assert part.stat().st_size <= MIN_SIZE
        return parts

    async def test_the_guest_is_held_and_nothing_is_lost(self, tmp_path, disk, full):
        parts = await self.run(tmp_path, disk)
        assert len(parts) > 1
        seqs = [trap.event.seq for part in parts for trap in traps_of(part)]
        assert seqs == list(range(1, MANY + 1))
        assert (self.taken, self.recorder.lost) == (MANY, 0)

    async def test_or_goes_on_unrecorded_until_there_is_room(self, tmp_path, disk, full):
        parts = await self.run(tmp_path, disk, on_error="continue")
        assert self.taken == MANY
        seqs = [trap.event.seq for part in parts for trap in traps_of(part)]
        assert len(seqs) + self.recorder.lost == MANY


class TestTheTotal:
    async def test_is_kept_and_what_was_removed_is_told(self, tmp_path, caplog):
        total = 4 * MIN_SIZE
        with caplog.at_level(logging.INFO, "vmibridge.recording"):
            parts = await record(tmp_path, lambda vm: calls(vm, 3 * MANY), max_total=total)
        assert sum(part.stat().st_size for part in parts) <= total
        removed = [text for text in caplog.messages if ": removed, " in text]
        assert removed
        last = int(parts[-1].stem.removeprefix("run-"))
        kept = [int(part.stem.removeprefix("run-")) for part in parts]
        assert kept == list(range(last - len(kept) + 1, last + 1)), "the last ones"
        assert len(removed) + len(kept) == last

    async def test_is_that_of_recordings_before_too(self, tmp_path):
        for _ in range(30):
            async with Recorder(tmp_path, max_total=4 * MIN_SIZE) as recorder:
                pass
        sizes = [part.stat().st_size for part in parts_of(tmp_path)]
        assert sum(sizes) <= 4 * MIN_SIZE
        assert len(sizes) > 5
        assert recorder.path.name == "run-30.mcap"

    async def test_that_cannot_be_kept_is_told(self, tmp_path, caplog):
        options = {"max_size": MIN_SIZE, "max_total": 2 * MIN_SIZE}
        async with Recorder(tmp_path, **options), Recorder(tmp_path, **options):
            assert not caplog.messages
            async with Recorder(tmp_path, **options):
                pass
        told = f"{tmp_path}: recordings may come to {3 * MIN_SIZE} bytes: none more can be removed"
        assert told in caplog.messages

    async def test_bounds_a_file_to_a_quarter_of_it(self, tmp_path):
        parts = await record(tmp_path, calls, max_size=None, max_total=4 * MIN_SIZE)
        assert len(parts) > 1
        assert all(part.stat().st_size <= MIN_SIZE for part in parts)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"max_size": MIN_SIZE - 1}, "max_size is at least 131072 bytes, got 131071"),
            ({"max_total": 4 * MIN_SIZE - 4}, "max_total is at least 524288 bytes, got 524284"),
            (
                {"max_size": MIN_SIZE, "max_total": 2 * MIN_SIZE - 1},
                "max_total is at least twice max_size, got 262143",
            ),
        ],
    )
    def test_and_a_size_make_sense(self, tmp_path, options, told):
        with pytest.raises(ValueError, match=told):
            Recorder(tmp_path, **options)

    def test_is_of_a_folder(self, path):
        with pytest.raises(ValueError, match="max_total is for recordings in a folder, and"):
            Recorder(path, max_total=1 << 30)
