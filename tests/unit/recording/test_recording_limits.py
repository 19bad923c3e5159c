"""What a recording may cost at most: traps that are not written yet, bytes, words of a problem."""

import errno
import logging
import os
import threading

import anyio
import anyio.lowlevel
import pytest
from recorded_session import reply, session, trap, write_file

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, BridgeServer
from vmibridge.engine.taps import Tap
from vmibridge.errors import RecordingError
from vmibridge.recording.file import writer as writer_module
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.reader import MAX_MESSAGE, RecordingReader
from vmibridge.recording.file.recover import recover
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import NOTE, REPLY, TRAP, MemoryAccess, Note
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent


class Answers(BridgeHandler[None]):
    MAGIC = 1
    REQUEST = 2

    async def handle(self, vmi, packet):
        await anyio.lowlevel.checkpoint()
        return BridgeResponse(value1=packet.value1)


class Taken(Tap):
    """Counts the traps that were taken."""

    count = 0

    def trap(self, event):
        self.count += 1


def guest_of(vcpus, calls):
    async def vcpu(vm, number):
        for value in range(calls):
            await vm.call(BridgePacket(1, 2, 0, value), vcpu=number)

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for number in range(vcpus):
                tasks.start_soon(vcpu, vm, number)

    return guest


async def record(recorder, *taps, vcpus=1, calls=3):
    async with recorder, FakeGuest(guest_of(vcpus, calls)) as vm:
        async for _ in BridgeServer(vm, Answers(), taps=[*taps, recorder]).run():
            pass


def read(path):
    """The messages of a file, and what is said of the rest."""
    with RecordingReader(path) as reader:
        return [each for _, each in reader.messages()], [each.text for each in reader.problems]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


@pytest.mark.anyio
@pytest.mark.parametrize("vcpus", [1, 4, 16])
@pytest.mark.parametrize("most", [2, 10])
async def test_each_further_vcpu_has_one_trap_more_that_is_not_written(
    path, monkeypatch, vcpus, most
):
    taken, permits, begun, ended = Taken(), threading.Semaphore(0), [], anyio.Event()
    add = RecordingWriter.add

    def held(writer, chunk):
        begun.append(writer.counts.get(TRAP.id, 0))
        assert permits.acquire(timeout=60)
        add(writer, chunk)

    async def run():
        await record(Recorder(path, flush_traps=most), taken, vcpus=vcpus, calls=20)
        ended.set()

    monkeypatch.setattr(RecordingWriter, "add", held)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        seen = 0
        try:
            with anyio.fail_after(60):
                while not ended.is_set():
                    if len(begun) == seen:
                        await anyio.sleep(0.001)
                        continue
                    seen = len(begun)
                    # A chunk is held: the vCPUs go on until they have to wait for it.
                    await anyio.wait_all_tasks_blocked()
                    assert taken.count - begun[-1] <= most + vcpus - 1
                    permits.release()
        finally:
            permits.release(10_000)
    assert taken.count == sum(isinstance(each, TrapEvent) for each in read(path)[0]) == 20 * vcpus


@pytest.mark.anyio
async def test_the_log_tells_how_much_is_in_the_file(path, caplog):
    with caplog.at_level(logging.INFO, "vmibridge.recording"):
        await record(Recorder(path), calls=7)
    assert [each.getMessage() for each in caplog.records] == [f"{path}: 7 traps were recorded"]


class FullDisk:
    """Stands for `os` in the writer."""

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")


class TestAFileThatCannotBeMade:
    @pytest.fixture(autouse=True)
    def full(self, monkeypatch):
        monkeypatch.setattr(writer_module, "os", FullDisk())

    def test_is_not_in_the_way_of_the_next(self, path):
        with pytest.raises(RecordingError, match="No space left"):
            RecordingWriter(path, "tests")
        assert not path.exists()

    def test_stays_where_it_was_there_before(self, path):
        path.touch()
        with pytest.raises(RecordingError, match="No space left"):
            RecordingWriter(path, "tests", overwrite=True)
        assert path.exists()


BEFORE = [(1, session()), *((n, each(n)) for n in range(1, 2000) for each in (trap, reply))]


@pytest.mark.parametrize("beyond", [-200, 200])
def test_a_large_message_is_recovered_or_told_and_costs_no_other(path, tmp_path, beyond):
    large = MemoryAccess("vm", 1, 0, MAX_MESSAGE, bytes(MAX_MESSAGE + beyond))
    write_file(path, BEFORE, [(5000, large)], [(6000, trap(2000))])
    told = recover(path, tmp_path / "clean.mcap")
    messages, problems = read(tmp_path / "clean.mcap")
    assert problems == []
    fits = beyond < 0
    assert [each for each in messages if not isinstance(each, (MemoryAccess, Note))] == [
        *(message for _, message in BEFORE),
        trap(2000),
    ]
    assert [each for each in messages if isinstance(each, MemoryAccess)] == [large] * fits
    assert ["is the most" in each.text for each in told.problems] == [True] * (not fits)


def test_a_problem_does_not_quote_the_file_at_length(path, tmp_path):
    fields = {"vm": "vm", "seq": 1, "vcpu": 0, "packet": {"magic": 1, "request": 1, "method": 1}}
    writer = RecordingWriter(path, "tests")
    for channel, message in [
        *[(REPLY, {**fields, "kind": "x" * 8_000_000})] * 5,
        (NOTE, Note("end", "0 traps", "vm")),
    ]:
        chunk = ChunkBuilder()
        chunk.add(channel.id, 1, message)
        writer.add(chunk.pack())
    writer.finish()
    messages, problems = read(path)
    assert messages == [Note("end", "0 traps", "vm")]
    assert len(problems) == 5
    assert max(map(len, problems)) <= 200
    recover(path, tmp_path / "clean.mcap")
    messages, problems = read(tmp_path / "clean.mcap")
    assert ([each.kind for each in messages], problems) == (["end", "lost"], [])
