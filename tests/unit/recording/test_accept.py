"""A new recording with the recorded traps and the new answers."""

import anyio
import pytest
from replay_parts import IDS, LOOPS, Probe, Shared, ask, everything, record, replay

from vmibridge import Bridge, BridgeResponse, BridgeServer, method
from vmibridge.aio.clock import VirtualTime, virtual_loop
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Note, Session
from vmibridge.recording.new_recording import NewRecording
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.accept import Accepted, write_accepted
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.selection import Selection
from vmibridge.recording.traps import recorded_traps

ALL = Selection()


class Changed(Probe):
    """Other answers, other accesses, other outcomes."""

    name = "probe"

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + 2).with_output({"sum": packet.value1 + 2})

    @method(2)
    async def copy(self, vmi, packet):
        data = await vmi.memory.read(0x2000, 4)
        await vmi.memory.write(0x3010, data)
        try:
            await vmi.memory.read(0x7000, 4)
        except Exception as error:
            return BridgeResponse(value1=5).with_output(str(error))

    @method(3)
    async def fail(self, vmi, packet):
        return BridgeResponse(value1=3)

    @method(4)
    async def unmapped(self, vmi, packet):
        raise ValueError("not any more")


def accepted(source, target, *handlers, loop=LOOPS[0], selection=ALL, **options):
    """Accept the new answers; returns how many."""
    verdict = Verdict(selection)
    verdict.accepted = Accepted(all_handlers=selection == ALL)
    replay(source, *handlers, loop=loop, verdict=verdict, **options)
    write_accepted(source, target, verdict.accepted)
    return verdict.accepted.count


def messages(path):
    with RecordingReader(path) as reader:
        found = [message for _, message in reader.messages()]
        assert reader.complete
        assert not reader.problem_count
        return found


def traps(path):
    with RecordingReader(path) as reader:
        return list(recorded_traps(reader.messages()))


@pytest.mark.parametrize("loop", LOOPS, ids=IDS)
def test_it_replays_the_same_and_to_accept_again_changes_nothing(tmp_path, loop):
    first, second, third = (tmp_path / f"{name}.mcap" for name in "abc")
    record(first, everything, loop=loop)
    assert accepted(first, second, Changed(), Shared(), loop=loop) == 6
    result = replay(second, Changed(), Shared(), loop=loop, strict=True)
    assert (result.compared, result.different, result.unchecked) == (28, 0, {})
    assert accepted(second, third, Changed(), Shared(), loop=loop) == 0
    assert third.read_bytes() == second.read_bytes()
    before, after = traps(first), traps(second)
    assert [each.event for each in after] == [each.event for each in before]
    assert [each.reply_time for each in after] == [each.reply_time for each in before]
    changed = [
        one.event.seq for one, other in zip(before, after, strict=True) if one.reply != other.reply
    ]
    assert changed == [1, 2, 3, 4, 5, 6]
    (end,) = (each for each in messages(second) if isinstance(each, Note) and each.kind == "end")
    assert {kind: end.counts[kind] for kind in ("handled", "failed")} == {
        "handled": sum(each.reply.kind is OutcomeKind.HANDLED for each in after),
        "failed": 1,
    }


def test_of_the_latest_time_that_there_is(tmp_path):
    first, late, second = (tmp_path / f"{name}.mcap" for name in "abc")
    record(first, everything)
    with RecordingReader(first) as reader, NewRecording(late) as recording:
        for place, (time, message) in enumerate(reader.messages()):
            recording.copy((1 << 64) - 1 if place > 20 else time, message)
    assert accepted(late, second, Changed(), Shared()) == 6
    assert replay(second, Changed(), Shared()).different == 0


def test_its_accesses_are_those_of_now(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, lambda vm: vm.call(ask(2)))
    accepted(first, second, Changed(), Shared())
    (trap,) = traps(second)
    assert trap.accesses == [
        MemoryAccess("vm", 1, 0x2000, 4, b"\0\1\2\3"),
        MemoryAccess("vm", 1, 0x3010, 4, b"\0\1\2\3", True),
        MemoryAccess("vm", 1, 0x7000, 4, error="it is not in the recording"),
    ]


def test_what_is_not_selected_stays(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, everything)
    selection = Selection.parse(methods=["add"])
    assert accepted(first, second, Changed(), Shared(), selection=selection) == 3
    result = replay(second, Changed(), Shared())
    assert result.different == 3
    assert result.first.seq == 4
    result = replay(second, Changed(), Shared(), verdict=Verdict(selection))
    assert (result.compared, result.different) == (3, 0)


def test_the_session_has_the_handlers_that_answered(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, everything)
    accepted(first, second, Changed(), Shared())
    then, now = (
        next(each for each in messages(path) if isinstance(each, Session))
        for path in (first, second)
    )
    kinds = {each.name: each.type.rpartition(".")[2] for each in now.handlers}
    assert kinds["probe"] == "Changed"
    assert {each.name: each.type.rpartition(".")[2] for each in then.handlers}["probe"] == "Probe"


def test_what_runs_natively_now_is_not_there(tmp_path):
    class Other(Probe):
        MAGIC = 0x5555
        name = "probe"

    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, everything, bridge=Bridge(Probe()))
    count = accepted(first, second, Other())
    assert count == len(traps(first))
    assert traps(second) == []
    end = messages(second)[-1]
    assert (end.counts["handled"], end.counts["native"]) == (0, count)


def test_retries_stay_with_the_request(tmp_path):
    async def guest(vm):
        for _ in range(50):
            if (await vm.call(ask(5, 7))).rax != 1:
                return
            await anyio.sleep(0.01)

    class Faster(Probe):
        name = "probe"

        @method(5, soft_timeout=0.02)
        async def slow(self, vmi, packet):
            return BridgeResponse(value1=99)

    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, guest, bridge=Bridge(Probe(pause=0.05)))
    assert accepted(first, second, Faster()) == 1
    then, now = traps(first), traps(second)
    assert len(then) == len(now) > 1
    assert [each.reply.kind for each in now] == [each.reply.kind for each in then]
    assert now[-1].reply.writes.values[0] == 99
    assert now[-1].reply.retry_of == 1
    result = replay(second, Faster())
    assert (result.compared, result.different) == (1, 0)


def test_what_was_left_out_is_left_out_of_the_new_one(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"

    async def guest(vm):
        await vm.call(ask(1, 5))

    record(first, guest, redact=["memory", "0x0001:value4"])
    # It cannot be asked: nothing is accepted, and nothing is lost.
    assert accepted(first, second, Changed(), Shared()) == 0
    assert messages(second)[1:] == messages(first)[1:]


def test_outputs_of_requests_whose_memory_is_left_out_are_left_out(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, lambda vm: vm.call(ask(1, 5)), redact=["memory"])
    assert accepted(first, second, Changed(), Shared()) == 1
    (trap,) = traps(second)
    assert trap.reply.writes.values[0] == 7
    assert (trap.reply.output, trap.reply.error) == (None, None)


def test_no_file_is_written_over(tmp_path):
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(first, everything)
    second.write_bytes(b"kept")
    with pytest.raises(ConfigError, match="already exists"):
        accepted(first, second, Changed(), Shared())
    assert second.read_bytes() == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mcap", "b.mcap"]


class Held(Probe):
    """Answers when it is let go."""

    name = "probe"

    def __init__(self):
        super().__init__()
        self.let_go = anyio.Event()

    @method(5, soft_timeout=0.02)
    async def slow(self, vmi, packet):
        await self.let_go.wait()
        return BridgeResponse(value1=9)


@pytest.mark.parametrize("loop", LOOPS, ids=IDS)
def test_a_replay_that_is_recorded_has_each_trap_once(tmp_path, loop):
    """It is told to wait more often than then: retries that the recording has not are made up."""

    async def guest(vm):
        while (await vm.call(ask(5, 7))).rax == 1:
            pass

    async def record_again(source, target):
        handler = Held()
        waits = 0
        async with Recorder(target) as recorder, ReplayBackend(source) as backend:
            server = BridgeServer(backend, Bridge(handler), taps=[recorder])
            async for outcome in server.run():
                waits += outcome.kind is OutcomeKind.WAITING
                if waits == 1:
                    handler.let_go.set()

    first, second, third = (tmp_path / f"{name}.mcap" for name in "abc")
    record(first, guest, bridge=Bridge(Probe()), loop=loop)
    for source, target in ((first, second), (second, third)):
        virtual, options = virtual_loop(loop[0], VirtualTime())
        anyio.run(record_again, source, target, backend=virtual, backend_options=options)
        seqs = [each.event.seq for each in traps(target)]
        assert len(seqs) == len(set(seqs)) > 1
        handler = Held()
        handler.let_go.set()
        result = replay(target, handler, loop=loop, strict=True)
        assert (result.compared, result.different, result.unchecked) == (1, 0, {})
