"""A recording that a program writes message by message."""

import stat

import pytest
from recorded_messages import read
from recorded_session import MAGIC, reply, session, trap

from vmibridge import BridgePacket, BridgeResponse, OutcomeKind
from vmibridge.errors import ConfigError, RecordingError
from vmibridge.recording import MemoryAccess, NewRecording, Note, Session, recorded_traps
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import RecordedArchitecture
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapReason

ASK = BridgePacket(MAGIC, 1, 2, 3, 4, 5, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made.mcap"


def test_has_what_was_added(path):
    messages = [(5, session()), (6, trap(1)), (7, reply(1)), (7, Note("end", "1 trap", "vm"))]
    with NewRecording(path) as recording:
        for time, message in messages:
            recording.add(message, time)
        assert not path.exists()
    assert read(path) == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {topic: n for topic, n in recording.counts.items() if n} == {
        "session": 1, "trap": 1, "reply": 1, "note": 1
    }  # fmt: skip


def test_counts_on_in_time(path):
    with NewRecording(path) as recording:
        recording.add(session())
        recording.add(trap(1), 1 << 63)
        recording.add(reply(1))
    times = [time for time, _ in read(path)]
    assert times[0] > 1_700_000_000 * 10**9
    assert times[1:] == [1 << 63] * 2


def test_has_whole_requests(path):
    with NewRecording(path) as recording:
        recording.add(session(), 0)
        answer = BridgeResponse(value1=9).with_output({"a": 1})
        assert recording.add_request(
            ASK, answer, handler="probe", accesses=[(0x2000, b"hi")], time=1, duration=0.5
        ) == 1  # fmt: skip
        assert recording.add_request(ASK, kind=OutcomeKind.FAILED, error="why", time=2) == 2
        assert recording.add_request(ASK, vm="other", vcpu=3, time=3) == 1
    first, second, third = recorded_traps(TimedMessage(*each) for each in read(path))
    assert first.packet == second.packet == third.packet == ASK
    assert first.accesses == [MemoryAccess("vm", 1, 0x2000, 2, b"hi")]
    assert (first.time, first.reply_time, first.reply.duration) == (1, 500_000_001, 0.5)
    assert first.reply.writes == RegisterWrites(0x1003, 9)
    assert (first.reply.output, first.reply.handler) == ('{"a":1}', "probe")
    assert (second.reply.kind, second.reply.error) == (OutcomeKind.FAILED, "why")
    assert (third.event.vm, third.event.vcpu) == ("other", 3)


@pytest.mark.parametrize(
    ("message", "time", "error"),
    [
        ("text", 0, TypeError),
        (trap(1, value="text"), 0, ValueError),
        (trap(1 << 64), 0, ValueError),
        (trap(1), -1, ValueError),
        (trap(1), 1 << 64, ValueError),
        (Session("vm", format=99), 0, ValueError),
        (Session("vm", architecture=RecordedArchitecture("z80", 1)), 0, ValueError),
        (TrapEvent(1, TrapReason.MSR, object()), 0, TypeError),
        (MemoryAccess("vm", 1, 0, 0, bytes(31 << 20)), 0, ValueError),
    ],
    ids=[
        "text",
        "value",
        "number",
        "early",
        "late",
        "format",
        "architecture",
        "registers",
        "large",
    ],
)
def test_takes_nothing_that_cannot_be_read(path, message, time, error):
    with NewRecording(path) as recording:
        with pytest.raises(error):
            recording.add(message, time)
        recording.add(trap(2), 0)
    assert read(path) == [(0, trap(2))]


def test_is_gone_when_its_block_raises(path, tmp_path):
    with pytest.raises(OSError, match="of the block"), NewRecording(path) as recording:
        recording.add(trap(1), 0)
        raise OSError("of the block")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecordingError, match="is not open"):
        recording.add(trap(1), 0)


def test_takes_the_place_of_no_file(path):
    path.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"), NewRecording(path):
        pass
    assert path.read_text() == "mine"


def test_says_when_the_disk_is_full(path, tmp_path, disk):
    with (
        pytest.raises(RecordingError, match=r"made\.mcap: No space left"),
        NewRecording(path, chunk_size=1) as recording,
    ):
        disk.room = 5
        recording.add(trap(1), 0)
    assert list(tmp_path.iterdir()) == []
