"""Messages that the recorder holds before it encodes them."""

import threading

import pytest
from recorded_session import reply, session, trap
from waiting import until

from vmibridge import Bridge, BridgeResponse
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import RecordingError
from vmibridge.recording import Recorder, RecordingReader
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.messages import CHANNELS, NOTE, REPLY, SESSION, TRAP, MemoryAccess, Note
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

pytestmark = pytest.mark.anyio
DATA = bytes(range(256))


def outcome(event, output=None):
    response = BridgeResponse().with_output(output)
    return Outcome(OutcomeKind.HANDLED, reply(event.seq).packet, response, event=event)


def begin(recorder):
    stopped = []
    recorder.begin("vm", Bridge(), ServerSettings(), stopped.append)
    return stopped


async def test_are_in_the_file_in_order_with_what_was_said_then(path):
    output = ["first"]
    async with Recorder(path) as recorder:
        begin(recorder)
        for seq in range(1, 301):
            event = trap(seq)
            recorder.trap(event)
            recorder.read(event, 0x1000, 256, DATA, None)
            recorder.read(event, 0x2000, 8192, DATA * 32, None)
            recorder.answered(outcome(event, output))
            output[0] = f"changed by {seq}"
    with RecordingReader(path) as reader:
        messages = [message for _, message in reader.messages()][1:]
    assert [message.seq for message in messages] == [seq for seq in range(1, 301) for _ in "1234"]
    assert [type(message).__name__ for message in messages[:4]] == [
        "TrapEvent", "MemoryAccess", "MemoryAccess", "Reply"
    ]  # fmt: skip
    outputs = [message.output for message in messages[3::4]]
    assert outputs == ['["first"]', *(f'["changed by {seq}"]' for seq in range(1, 300))]


async def test_are_written_after_the_interval(path):
    async with Recorder(path, flush_interval=0.01) as recorder:
        begin(recorder)
        recorder.trap(trap(1))

        def is_there():
            with RecordingReader(path) as reader:
                return any(isinstance(message, TrapEvent) for _, message in reader.messages())

        await until(is_there)


async def test_one_that_cannot_be_encoded_ends_the_recording(path):
    bad = TrapEvent(2, TrapReason.VMCALL, Registers(rax=1 << 64))
    with pytest.raises(RecordingError, match="the recording ends here"):
        async with Recorder(path, flush_interval=0.01) as recorder:
            stopped = begin(recorder)
            recorder.trap(trap(1))
            recorder.trap(bad)
            await until(lambda: recorder.error is not None)
            recorder.trap(trap(3))
    assert stopped == [recorder.error]
    assert recorder.lost == 3


async def test_an_access_does_not_wait_for_the_room_of_traps(path, monkeypatch):
    go_on = threading.Event()
    async with Recorder(path, flush_traps=2) as recorder:
        write = recorder._write

        def held(chunk):
            assert go_on.wait(60)
            return write(chunk)

        monkeypatch.setattr(recorder, "_write", held)
        begin(recorder)
        for seq in (1, 2):
            recorder.trap(trap(seq))
            recorder.answered(outcome(trap(seq)))
        assert recorder.full
        # Another vCPU, whose handler would be taken for one that waits.
        recorder.read(trap(3), 0x1000, 256, DATA, None)
        assert not recorder.full
        recorder.answered(outcome(trap(3)))
        assert recorder.full
        go_on.set()
        await recorder.room()
        assert not recorder.full


MESSAGES = [
    (SESSION, 5, session()),
    (TRAP, 7, trap(1)),
    (NOTE, 6, Note("retry", "asks again", "vm", 1, 0)),
    (REPLY, 9, reply(1)),
    (NOTE, 8, Note("end", "over", "vm")),
]


@pytest.mark.parametrize("count", range(1, len(MESSAGES) + 1))
def test_a_chunk_is_the_same_however_they_came(count):
    one_by_one, together = ChunkBuilder(), ChunkBuilder()
    for channel, time, message in MESSAGES[:count]:
        size = one_by_one.add(channel.id, time, message)
        together.held.append((channel.id, time, message))
    assert len(together) == 0
    assert together.settle() == size == len(one_by_one)
    packed = together.pack()
    assert packed == one_by_one.pack()
    times = [time for _, time, _ in MESSAGES[:count]]
    assert (packed.start_time, packed.end_time) == (min(times), max(times))


@pytest.mark.parametrize("message_index", [False, True])
def test_a_chunk_names_indexes_only_when_it_has_those_of_all_channels(message_index):
    chunk = ChunkBuilder(message_index=message_index)
    for channel, time, message in MESSAGES:
        chunk.add(channel.id, time, message)
    packed = chunk.pack()
    assert set(packed.index_offsets) == ({1, 2, 4, 5} if message_index else set())
    # A session and the end, of 16 bytes each; or all.
    entries = len(MESSAGES) if message_index else 2
    channels = 4 if message_index else 2
    assert len(packed.data) - packed.chunk_length == 15 * channels + 16 * entries


def test_a_chunk_of_ordinary_traps_has_no_index_at_all():
    chunk = ChunkBuilder()
    for channel, time, message in MESSAGES[1:4]:
        chunk.add(channel.id, time, message)
    chunk.add(CHANNELS[2].id, 7, MemoryAccess("vm", 1, 0x1000, 4, b"data"))
    packed = chunk.pack()
    assert len(packed.data) == packed.chunk_length
