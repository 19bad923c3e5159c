"""`Recorder.lost` when the recorder raised and was dropped: a trap is in the file or counted."""

import logging
import threading

import anyio
import anyio.from_thread
import pytest

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer
from vmibridge.errors import RecordingError
from vmibridge.recording import Recorder, RecordingReader
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

pytestmark = pytest.mark.anyio

MAGIC = 0x1234
CALLS = 12
BAD = 5


class Answers(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    async def handle(self, vmi, packet):
        return BridgeResponse(packet.value1)


async def guest(vm):
    for number in range(CALLS):
        await vm.call(BridgePacket(MAGIC, 1, 1, number))


class Fault(Exception):
    pass


class RaisesInTrap(Recorder):
    """Cannot take the trap: it is not in the file."""

    bad = BAD

    def trap(self, event):
        if event.vm == "bad" and event.seq == self.bad:
            raise Fault("trap")
        super().trap(event)


class RaisesInAnswered(Recorder):
    """Has the trap, and cannot take what became of it."""

    def answered(self, outcome):
        if outcome.event.vm == "bad" and outcome.event.seq == BAD:
            raise Fault("answered")
        super().answered(outcome)


class RaisesInBegin(Recorder):
    def begin(self, vm, bridge, settings, stop):
        super().begin(vm, bridge, settings, stop)
        if vm == "bad":
            raise Fault("begin")


async def record(recorder, *names):
    """The number of traps that were taken."""
    async with recorder:
        for name in names:
            async with FakeGuest(guest, vm=name) as vm:
                server = BridgeServer(vm, Bridge(Answers()), taps=[recorder])
                async for _ in server.run():
                    pass
    return CALLS * len(names)


def traps_in(path):
    with RecordingReader(path) as reader:
        return sum(isinstance(message, TrapEvent) for _, message in reader.messages())


@pytest.mark.parametrize("make", [RaisesInTrap, RaisesInAnswered, RaisesInBegin])
@pytest.mark.parametrize("names", [("bad",), ("bad", "good"), ("good", "bad")], ids="-".join)
async def test_counts_what_the_recorder_was_not_told_of(make, names, tmp_path, caplog):
    path = tmp_path / "run.mcap"
    recorder = make(path, on_error="continue")
    with caplog.at_level(logging.ERROR):
        taken = await record(recorder, *names)
    assert recorder.lost > 0
    assert traps_in(path) + recorder.lost == taken
    assert caplog.messages[-1].endswith(f"; {recorder.lost} traps were not recorded")


async def test_and_those_that_were_taken_before_the_run_ended(tmp_path):
    path = tmp_path / "run.mcap"
    recorder = RaisesInTrap(path)
    answered = 0
    with pytest.raises(RecordingError):
        async with recorder, FakeGuest(guest, vm="bad") as vm:
            async for _ in BridgeServer(vm, Bridge(Answers()), taps=[recorder]).run():
                answered += 1
    assert BAD <= answered < CALLS
    assert traps_in(path) + recorder.lost == answered


async def test_not_what_was_being_written_then_and_is_in_the_file(tmp_path, monkeypatch):
    path = tmp_path / "run.mcap"
    recorder = RaisesInTrap(path, on_error="continue", flush_traps=2)
    recorder.bad = 2
    writing, go_on = anyio.Event(), threading.Event()
    write = recorder._write

    def held_write(chunk):
        if chunk.traps:
            anyio.from_thread.run_sync(writing.set)
            assert go_on.wait(30)
        return write(chunk)

    monkeypatch.setattr(recorder, "_write", held_write)

    async def one_and_the_bad_one(vm):
        await vm.call(BridgePacket(MAGIC, 1, 1))
        await writing.wait()
        await vm.call(BridgePacket(MAGIC, 1, 1))
        go_on.set()

    async with recorder, FakeGuest(one_and_the_bad_one, vm="bad") as vm:
        async for _ in BridgeServer(vm, Bridge(Answers()), taps=[recorder]).run():
            pass
    assert (traps_in(path), recorder.lost) == (1, 1)
