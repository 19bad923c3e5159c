"""Traps that are recorded together with their replies, since nothing came in between."""

import anyio
import msgspec
import pytest
from recorded_session import reply, trap, write_file
from recorder_parts import ask, record
from replay_parts import LOOPS, replay, run
from toy_architecture import TOY, known_toy, toy_trap

from vmibridge import Bridge, BridgeHandler, BridgeResponse, Outcome, method
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording import Recorder, RecordingReader
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import (
    MAX_PLAIN,
    PLAIN,
    REPLY,
    SESSION,
    TRAP,
    PlainTrap,
    PlainTraps,
    RecordedArchitecture,
    Reply,
    Session,
    Step,
    json_schema,
)
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

pytestmark = pytest.mark.anyio


def in_file(path):
    """The messages of a file as it has them: `PlainTraps`, and others without their times."""
    with RecordingReader(path) as reader:
        found = list(reader.messages_of_file())
        assert (reader.problems, reader.complete) == ([], True)
    return [each if isinstance(each, PlainTraps) else each.message for each in found]


def given(path, *kinds):
    """What the reader gives of it, and how many problems there were."""
    with RecordingReader(path) as reader:
        return [tuple(each) for each in reader.messages(*kinds)], reader.problem_count


def written(path, *messages):
    """A file of these messages of the channel, whatever is in them."""
    writer, chunk = RecordingWriter(path, "tests"), ChunkBuilder()
    for message in messages:
        chunk.add(PLAIN.id, 5, message)
    writer.add(chunk.pack())
    writer.finish()
    return path


def plain(seq, **fields):
    """The fields of a `PlainTrap`, as a recorder has them."""
    event = trap(seq)
    made = PlainTrap(5, event, 7, handler="probe", **fields)
    return msgspec.structs.astuple(made)


class Probe(BridgeHandler[int]):
    MAGIC = 0x1234_5678
    REQUEST = 2
    name = "probe"

    @method(1)
    async def at_once(self, vmi, packet):
        return BridgeResponse(packet.value1).with_output(packet.value1)

    @method(2)
    async def waits(self, vmi, packet):
        await anyio.sleep(0)
        return BridgeResponse(packet.value1)

    @method(3)
    async def looks(self, vmi, packet):
        await vmi.memory.read(0x2000, 8)
        return BridgeResponse(packet.value1)


class Reads(Probe):
    name = "probe"

    @method(1)
    async def at_once(self, vmi, packet):
        await vmi.memory.read(0x2000, 8)
        return BridgeResponse(packet.value1).with_output(packet.value1)


class Waits(Probe):
    name = "probe"

    @method(1)
    async def at_once(self, vmi, packet):
        await anyio.sleep(0.001)
        return BridgeResponse(packet.value1).with_output(packet.value1)


class Differs(Probe):
    name = "probe"

    @method(1)
    async def at_once(self, vmi, packet):
        return BridgeResponse(packet.value1 + (packet.value1 == 2)).with_output(packet.value1)


def asks(*methods):
    async def guest(vm):
        for number, code in enumerate(methods):
            await vm.call(ask(code, number))

    return guest


async def test_stand_together_until_something_else_is_recorded(path):
    await record(path, asks(1, 1, 1, 3, 1, 2, 1), bridge=Bridge(Probe()))
    # How many steps there are differs from loop to loop, and a chunk may end anywhere.
    found = []
    for each in in_file(path):
        if isinstance(each, PlainTraps):
            seqs = [plain.event.seq for plain in each.traps]
            if found and isinstance(found[-1], list):
                found[-1] += seqs
            else:
                found.append(seqs)
        elif not isinstance(each, Step):
            found.append(type(each).__name__)
    assert found == [
        "Session", [1, 2, 3],
        "TrapEvent", "MemoryAccess", "Reply", [5],
        "TrapEvent", "Reply", [7],
        "Note",
    ]  # fmt: skip


async def test_are_given_as_traps_and_replies(path):
    outcomes, _ = await record(path, asks(1, 3, 1), bridge=Bridge(Probe()))
    messages, _ = given(path, TRAP, REPLY)
    assert [type(each) for _, each in messages] == [TrapEvent, Reply] * 3
    times = [time for time, _ in messages]
    assert times == sorted(times)
    for outcome, (_, event), (_, answer) in zip(
        outcomes, messages[::2], messages[1::2], strict=True
    ):
        assert event == outcome.event
        assert (answer.packet, answer.kind) == (outcome.packet, outcome.kind)
        assert (answer.writes, answer.duration) == (outcome.writes, outcome.duration)
        assert (answer.handler, answer.vcpu, answer.retry_of) == ("probe", 0, None)
    assert given(path, TRAP)[0] == messages[::2]
    assert given(path, REPLY)[0] == messages[1::2]


async def test_what_a_dispatcher_says_that_was_asked_is_kept(path):
    async with Recorder(path) as recorder:
        recorder.begin("vm", Bridge(), ServerSettings(), print)
        recorder._looks_at_packets = True
        for seq, packet in ((1, reply(1).packet), (2, ask(9, 9))):
            event = trap(seq)
            recorder.taken_at(1.0)
            recorder.trap(event)
            recorder.answered(Outcome(OutcomeKind.HANDLED, packet, event=event))
    messages, _ = given(path, REPLY)
    assert [each.packet for _, each in messages] == [reply(1).packet, ask(9, 9)]


@pytest.mark.parametrize("how", [{"redact": ("value1",)}, {"max_size": 1 << 20}])
async def test_there_are_none_where_something_is_decided_trap_by_trap(path, how):
    async with Recorder(path, **how) as recorder:
        recorder.begin("vm", Bridge(), ServerSettings(), print)
        event = trap(1)
        recorder.taken_at(1.0)
        recorder.trap(event)
        recorder.answered(Outcome(OutcomeKind.HANDLED, reply(1).packet, event=event))
    assert not any(isinstance(each, PlainTraps) for each in in_file(path))


class TestAFileOfOthers:
    def test_has_a_schema_that_says_how_many_there_are(self):
        assert f'"maxItems":{MAX_PLAIN}' in json_schema(PLAIN).decode()

    def test_with_too_many_loses_that_message(self, path):
        many = {"traps": [plain(1)] * (MAX_PLAIN + 1)}
        messages, problems = given(written(path, many, {"traps": [plain(2)]}))
        assert [each.seq for _, each in messages] == [2, 2]
        assert problems == 1

    def test_with_none_in_a_message_has_none(self, path):
        assert given(written(path, {"traps": [plain(1)]}, {"traps": [plain(2)]}))[1] == 0

    def test_with_a_trap_that_asks_nothing_loses_its_reply(self, path):
        event = TrapEvent(1, TrapReason.VMCALL, Registers(r8=-1))
        messages, problems = given(written(path, {"traps": [(5, event, 7)]}))
        assert (messages, problems) == ([(5, event)], 1)

    @pytest.mark.parametrize("time", [-1, 0.5, "now"])
    def test_with_a_time_that_is_none_loses_that_message(self, path, time):
        fields = (5, trap(1), time)
        messages, problems = given(written(path, {"traps": [fields]}))
        assert (messages, problems) == ([], 1)

    def test_has_the_registers_of_its_session(self, path):
        with known_toy():
            session = Session(
                "toy", format=4, architecture=RecordedArchitecture("toy", TOY.version)
            )
            event = toy_trap(vm="toy")
            writer, chunk = RecordingWriter(path, "tests"), ChunkBuilder()
            chunk.add(SESSION.id, 1, session)
            chunk.add(PLAIN.id, 5, {"traps": [(5, event, 7), plain(9)]})
            writer.add(chunk.pack())
            writer.finish()
            messages, problems = given(path, TRAP)
        assert [each.registers for _, each in messages] == [event.registers, trap(9).registers]
        assert problems == 0


@pytest.mark.parametrize("handler", [Probe, Reads, Waits, Differs])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_are_replayed_whatever_their_handler_does_now(path, handler, apart, loop):
    run(lambda: record(path, asks(1, 1, 1, 3, 1, 1), bridge=Bridge(Probe())), loop)
    if apart:
        messages, _ = given(path)
        path = write_file(path.with_name("apart.mcap"), messages)
    differences = []
    result = replay(path, handler(), loop=loop, differences=differences)
    assert result.compared == 6
    assert result.unchecked == {}
    expected = {Probe: [], Reads: [1, 2, 3, 5, 6], Waits: [], Differs: [3]}[handler]
    assert [each.seq for each in differences] == expected


async def test_one_whose_handler_never_began_has_its_step_before_its_reply(path):
    async with Recorder(path) as recorder:
        recorder.begin("vm", Bridge(), ServerSettings(), print)
        event = trap(1)
        recorder.taken_at(1.0)
        recorder.trap(event)
        recorder.handler_stepped(event, 1, "queued")
        recorder.answered(Outcome(OutcomeKind.CANCELLED, reply(1).packet, event=event))
    names = [type(message).__name__ for _, message in given(path)[0]]
    assert names == ["Session", "TrapEvent", "Step", "Reply"]
