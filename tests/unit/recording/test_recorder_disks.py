"""A recorder on disks that are slow or broken, and what can be recovered."""

import errno
import itertools
import logging
import threading

import anyio
import pytest
from recorder_parts import Probe, Told, as_told, ask, calls, read, record, serve
from waiting import until

from vmibridge import (
    Bridge,
)
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError, RecordingError, RecordingReadError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.recover import recover
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import FILE_CHANNELS, PlainTraps, Reply
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

pytestmark = pytest.mark.anyio


def read_part(path):
    """What can be read of a file, and what is said of the rest."""
    with RecordingReader(path) as reader:
        return [each for _, each in reader.messages()], [each.text for each in reader.problems]


def traps_in(path):
    return sum(isinstance(each, TrapEvent) for each in read_part(path)[0])


class TestADiskThatIsSlow:
    @pytest.mark.parametrize("most", [2, 3, 10])
    async def test_holds_the_guest_and_loses_nothing(self, path, most, monkeypatch):
        told, permits, begun, ended = Told(), threading.Semaphore(0), [], anyio.Event()
        add = RecordingWriter.add

        def held(writer, chunk):
            begun.append(chunk)
            assert permits.acquire(timeout=60)
            add(writer, chunk)

        async def run():
            await record(path, calls(20), flush_traps=most, taps=[told])
            ended.set()

        monkeypatch.setattr(RecordingWriter, "add", held)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await until(lambda: told.names().count("trap") == most)
            try:
                for chunks in itertools.count(1):
                    # This one waits for its permit: those before it have been accounted for.
                    await until(lambda count=chunks: len(begun) == count or ended.is_set())
                    if ended.is_set():
                        break
                    await anyio.wait_all_tasks_blocked()
                    assert told.names().count("trap") - traps_in(path) <= most
                    permits.release()
            finally:
                permits.release(1000)
        assert told.names().count("trap") == 20
        assert [as_told(message) for message in read(path)] == told.calls

    @pytest.mark.parametrize("interval", [0.01, 0.2])
    async def test_gets_what_is_there_at_each_interval(self, path, interval):
        go_on = anyio.Event()

        async def guest(vm):
            await vm.call(ask(1))
            await go_on.wait()

        async with (
            Recorder(path, flush_interval=interval) as recorder,
            FakeGuest(guest) as vm,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(serve, vm, recorder)
            await until(lambda: path.exists() and Reply in map(type, read_part(path)[0]))
            assert traps_in(path) == 1
            go_on.set()


ROOMS = pytest.mark.parametrize("room", [0, 1, 700, 5000])


class TestADiskThatBreaks:
    @pytest.fixture(autouse=True)
    def broken(self, disk):
        disk.code = errno.EIO

    async def run(self, path, disk, room, **options):
        """Many calls; it takes some chunks and a part of one. Returns all we know."""
        told = Told()
        recorder = Recorder(path, flush_traps=8, **options)
        with anyio.fail_after(60):
            async with recorder, FakeGuest(calls(500)) as vm:
                disk.room = room
                try:
                    await serve(vm, told, recorder)
                finally:
                    self.recorder, self.told = recorder, told

    def check_the_file(self, path):
        messages, problems = read_part(path)
        assert problems == ["the file ends here: it is truncated, or was not finished"]
        assert [as_told(message) for message in messages] == self.told.calls[: len(messages)]
        taken = self.told.names().count("trap")
        assert traps_in(path) + self.recorder.lost == taken

    @ROOMS
    async def test_ends_the_run(self, path, disk, room):
        with pytest.raises(RecordingError, match=r"ends here: Input/output error") as error:
            await self.run(path, disk, room)
        assert isinstance(error.value.__cause__, OSError)
        assert self.recorder.error is error.value
        assert self.told.names().count("trap") < 500
        assert self.told.names()[-1] == "end", "the guest is let go in good order"
        self.check_the_file(path)

    @ROOMS
    async def test_or_is_passed_over(self, path, disk, room, caplog):
        with caplog.at_level(logging.ERROR):
            await self.run(path, disk, room, on_error="continue")
        assert self.told.names().count("answered") == 500
        assert self.recorder.lost > 0
        self.check_the_file(path)
        first, last = (record.getMessage() for record in caplog.records)
        assert first.endswith("Input/output error; the run continues without a recording")
        assert last.endswith(f"; {self.recorder.lost} traps were not recorded")

    async def test_ends_the_run_of_a_vm_that_begins_later(self, path, disk):
        told = Told()
        with pytest.raises(RecordingError):
            async with Recorder(path) as recorder, FakeGuest(calls(3)) as vm:
                disk.room = 0
                recorder.begin("before", Bridge(Probe()), ServerSettings(), lambda error: None)
                await until(lambda: recorder.error)
                await serve(vm, told, recorder)
        assert told.names() == ["begin", "end"]


class TestRecovery:
    def messages_in(self, reader, at, data):
        found = reader._decode(at, data, {channel.id for channel in FILE_CHANNELS})
        return sum(2 * len(each.traps) if isinstance(each, PlainTraps) else 1 for each in found)

    def damage(self, path, how):
        """Damage a file; returns which messages are left of it."""
        with RecordingReader(path) as reader:
            chunks = [at for at, _ in reader.chunks()]
            counts = [self.messages_in(reader, *chunk) for chunk in reader.chunks()]
        data, messages = bytearray(path.read_bytes()), read(path)
        middle = len(chunks) // 2
        start = sum(counts[:middle])
        if how == "truncated":
            del data[chunks[middle] + 50 :]
            del messages[start:]
        elif how == "without-its-index":
            del data[-100:]
        elif how == "damaged":
            data[chunks[middle] + 80] ^= 0xFF
            del messages[start : start + counts[middle]]
        path.write_bytes(data)
        return messages

    @pytest.mark.parametrize("how", ["truncated", "without-its-index", "damaged", "whole"])
    async def test_keeps_all_that_can_be_read(self, path, how):
        await record(path, calls(40), flush_traps=4)
        left = self.damage(path, how)
        target = path.with_name("clean.mcap")
        result = recover(path, target)
        messages = read(target)
        whole = how == "whole"
        assert (result.complete, result.problem_count) == (whole, 0 if whole else 1)
        assert messages[: len(left)] == left
        assert [each.kind for each in messages[len(left) :]] == ([] if whole else ["lost"])
        if not whole:
            assert messages[-1].text == "; ".join(map(str, result.problems))
        assert result.messages["trap"] == len(read(target, TrapEvent))
        assert sum(result.messages.values()) == len(messages)

    async def test_leaves_a_target_that_is_there(self, path, tmp_path):
        await record(path, calls(1))
        target = tmp_path / "dear.txt"
        target.write_text("something dear")
        with pytest.raises(ConfigError, match="already exists"):
            recover(path, target)
        assert target.read_text() == "something dear"

    @pytest.mark.parametrize("content", [b"", b"no recording", b"\x89MCAP1\r\n"])
    def test_of_something_else_makes_no_file(self, tmp_path, content):
        source = tmp_path / "source"
        source.write_bytes(content)
        with pytest.raises(RecordingReadError):
            recover(source, tmp_path / "target")
        assert [each.name for each in tmp_path.iterdir()] == ["source"]
