"""The figures of a report, against a plain computation over all traps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge import OutcomeKind, Registers, RegisterWrites, TrapEvent, TrapReason
from vmibridge.bridge.registers import read_packet
from vmibridge.cli import main
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import REPLY, SESSION, TRAP, Reply, Session
from vmibridge.recording.report.statistics import MAX_EXACT, Latency, Statistics
from vmibridge.recording.traps import RecordedTrap


def recorded(seq, request=1, method=0, kind=OutcomeKind.HANDLED, duration=1e-5, handler="probe"):
    registers = Registers(rcx=0x1234, rdx=request | method << 16)
    event = TrapEvent(seq, TrapReason.VMCALL, registers, ip=0x1000, length=3)
    packet = read_packet(event)
    reply = Reply("vm", seq, 0, kind, packet, RegisterWrites(0x1003), handler, duration=duration)
    return RecordedTrap(seq * 1000, event, packet, reply=reply)


durations = st.lists(st.integers(0, MAX_EXACT), min_size=1, max_size=200)


class TestLatency:
    @given(durations, st.sampled_from([500, 900, 990, 999, 1000]))
    def test_a_quantile_is_off_by_a_bucket_at_most(self, values, permille):
        latency = Latency()
        for value in values:
            latency.add(value)
        rank = max(1, -(-len(values) * permille // 1000))
        exact = sorted(values)[rank - 1]
        assert abs(latency.quantile(permille) - exact) <= max(1.5, exact * 0.0223)

    @given(durations, durations)
    def test_two_together_are_as_one(self, first, second):
        left, right, both = Latency(), Latency(), Latency()
        for value in first:
            left.add(value)
            both.add(value)
        for value in second:
            right.add(value)
            both.add(value)
        left.merge(right)
        for name in Latency.__slots__:
            assert getattr(left, name) == getattr(both, name)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2]),
            st.sampled_from([0, 7]),
            st.sampled_from(list(OutcomeKind)),
            st.floats(0, 100),
        ),
        max_size=60,
    )
)
def test_counts_are_by_handler_and_method(made):
    found = Statistics()
    for seq, (request, method, kind, duration) in enumerate(made):
        found.add(recorded(seq, request, method, kind, duration, f"handler{request}"))
    told = found.as_dict()
    counts = {kind.value: sum(each[2] is kind for each in made) for kind in OutcomeKind}
    assert told["outcomes"] == {kind: count for kind, count in counts.items() if count}
    for group in told["groups"]:
        mine = [each for each in made if each[:2] == (group["request"], group["method"])]
        assert group["handler"] == f"handler{group['request']}"
        assert sum(group["outcomes"].values()) == len(mine)
        assert group["max"] == pytest.approx(max(each[3] for each in mine) * 1e9, abs=1)


def test_any_number_of_methods_takes_a_bounded_space():
    found = Statistics()
    for seq in range(5000):
        found.add(recorded(seq, method=seq))
    groups = found.as_dict()["groups"]
    assert len(groups) <= 501
    assert sum(sum(group["outcomes"].values()) for group in groups) == 5000


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "run.mcap"
    writer = RecordingWriter(path, "test")
    chunk = ChunkBuilder()
    chunk.add(SESSION.id, 0, Session("vm"))
    for seq in range(1, 301):
        trap = recorded(seq, kind=OutcomeKind.FAILED if seq == 299 else OutcomeKind.HANDLED)
        chunk.add(TRAP.id, trap.time, trap.event)
        chunk.add(REPLY.id, trap.time + 10, trap.reply)
    writer.add(chunk.pack())
    writer.finish()
    return path


class TestTheCommand:
    def test_shows_so_many_and_what_matters_of_the_rest(self, recording, capsys):
        assert main(["report", str(recording), "--limit", "10"]) == 0
        told = capsys.readouterr().out
        shown = int(re.search(r"300 traps, (\d+) shown", told)[1])
        assert 11 <= shown < 300

    def test_writes_over_nothing_unless_told_to(self, recording, capsys):
        page = recording.with_suffix(".html")
        page.write_text("mine")
        assert main(["report", str(recording)]) == 2
        assert "--force" in capsys.readouterr().err
        assert page.read_text() == "mine"
        assert main(["report", str(recording), "--force"]) == 0
        assert page.read_text().lower().startswith("<!doctype html>")

    def test_never_writes_over_the_recording(self, recording):
        before = recording.read_bytes()
        assert main(["report", str(recording), "-o", str(recording), "--force"]) == 2
        assert recording.read_bytes() == before

    def test_tells_of_a_file_in_parts(self, recording, capsys):
        recording.write_bytes(recording.read_bytes()[:-100])
        assert main(["report", str(recording)]) == 0
        assert "has 1 problem; the report lists them" in capsys.readouterr().out

    def test_refuses_what_is_no_recording(self, tmp_path, capsys):
        path = tmp_path / "run.mcap"
        path.write_bytes(b"nothing of the kind")
        assert main(["report", str(path)]) == 2
        assert "is not an MCAP file" in capsys.readouterr().err
        assert not path.with_suffix(".html").exists()
