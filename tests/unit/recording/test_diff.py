"""Two recordings, compared without handlers."""

from array import array
from pathlib import Path
from random import Random

import msgspec
import pytest
from laws import LONG
from recorded_session import MAGIC, Outer, Probe, record, reply, session, trap, write_file

from vmibridge import BridgePacket, BridgeResponse, OutcomeKind
from vmibridge.recording import MemoryAccess, NewRecording, Note, RecordingReader
from vmibridge.recording.diff import comparison
from vmibridge.recording.diff.alignment import WINDOW, aligned
from vmibridge.recording.diff.comparison import compare
from vmibridge.recording.redaction import RedactionRule
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import RegisterWrites

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.mcap"))
WAITING = OutcomeKind.WAITING


def compared(one, other, *, rename=None, **options):
    with RecordingReader(one) as a, RecordingReader(other) as b:
        return compare(a, b, selection=Selection(), rename=rename or {}, **options)


@pytest.fixture
def diff(tmp_path):
    """Compares the recordings of two lists of messages."""

    def diff(one, other, **options):
        paths = [tmp_path / name for name in ("a.mcap", "b.mcap")]
        for path, messages in zip(paths, (one, other), strict=True):
            path.unlink(missing_ok=True)
            write_file(path, [(1, session()), *((at, each) for at, each in enumerate(messages, 2))])
        return compared(*paths, **options)

    return diff


def told(found):
    return [(group.field, group.count, group.seq_a, group.seq_b) for group in found.groups]


def request(seq, *, value=0, accesses=(), **fields):
    return [trap(seq, value=value), *accesses, reply(seq, **fields)]


def requests(*values):
    return [each for seq, value in enumerate(values, 1) for each in request(seq, value=value)]


class TestAlignment:
    @pytest.mark.parametrize(
        ("one", "other", "pairs"),
        [
            ("", "", []),
            ("abc", "abc", ["aa", "bb", "cc"]),
            ("abc", "axc", ["aa", "bx", "cc"]),
            ("abxc", "abc", ["aa", "bb", "x-", "cc"]),
            ("abc", "xyabc", ["-x", "-y", "aa", "bb", "cc"]),
            ("abc", "", ["a-", "b-", "c-"]),
            ("aaaa", "aaa", ["aa", "aa", "aa", "a-"]),
            ("abc", "xyz", ["ax", "by", "cz"]),
        ],
    )
    def test_finds_where_two_meet_again(self, one, other, pairs):
        rows = [array("Q", map(ord, text)) for text in (one, other)]
        found = [
            ("-" if at is None else one[at]) + ("-" if to is None else other[to])
            for at, to in aligned(*rows)
        ]
        assert found == pairs

    def test_has_each_once_and_in_order(self):
        for seed in range(200):
            rng = Random(seed)
            rows = [[rng.randrange(9) for _ in range(rng.randrange(300))] for _ in "ab"]
            pairs = list(aligned(*(array("Q", row) for row in rows)))
            for side, row in enumerate(rows):
                places = [pair[side] for pair in pairs if pair[side] is not None]
                assert places == list(range(len(row)))

    def test_takes_the_time_of_a_walk(self):
        searched = 0

        class Counted(array):
            def __getitem__(self, place):
                nonlocal searched
                searched += 1
                return super().__getitem__(place)

        size = 20 * WINDOW
        rows = [Counted("Q", range(start, start + size)) for start in (0, size)]
        assert len(list(aligned(*rows))) == size
        assert searched < 10 * size


class TestFields:
    def test_are_named_that_differ(self, diff):
        writes, others = RegisterWrites(0x1003, 1, 2), RegisterWrites(0x1004, 1, 3)
        one = request(1, writes=writes, output="1", error="a", handler="x")
        failed = {"writes": others, "output": "2", "error": "b", "handler": "y"}
        other = [trap(1), reply(1, OutcomeKind.FAILED, **failed)]
        found = diff(one, other)
        assert (found.compared, found.different, found.is_same) == (1, 1, False)
        fields = [group.field for group in found.groups]
        assert fields == ["outcome", "handler", "rip", "value2", "error", "output"]
        assert {(group.where, group.count) for group in found.groups} == {("x 0x0001/0x0001", 1)}
        shown = {group.field: (group.a, group.b) for group in found.groups}
        assert shown["value2"] == ("0x2", "0x3")
        assert shown["outcome"] == ("handled", "failed")

    def test_are_registers_where_nothing_else_is(self, diff):
        event = msgspec.structs.replace(trap(1), ip=7)
        found = diff(request(1), [event, reply(1)])
        assert told(found) == [("registers", 1, 1, 1)]
        assert (found.groups[0].a, found.groups[0].b) == ("ip=0x1000", "ip=0x7")
        assert diff(request(1), [event, reply(1)], ignored=["registers"]).is_same

    def test_are_told_alike_where_a_reply_has_none(self, diff):
        found = diff(request(1, writes=RegisterWrites(0x1003, 1)), request(1))
        shown = {group.field: (group.a, group.b) for group in found.groups}
        assert shown == {"rip": ("0x3", "left alone"), "value1": ("0x1", "left alone")}

    def test_are_outputs_by_value(self, diff):
        same = [('{"a":1,"b":2}', '{ "b": 2, "a": 1 }'), ("<A at 0x7f01>", "<A at 0x7f02>")]
        for one, other in same:
            assert diff(request(1, output=one), request(1, output=other)).is_same
        assert not diff(request(1, output="<A at 0x1>"), request(1, output="<B at 0x1>")).is_same

    def test_are_accesses_with_their_bytes(self, diff):
        def reads(data, address=0, write=False):
            return request(1, accesses=[MemoryAccess("vm", 1, address, 1, data, write)])

        assert told(diff(reads(b"a"), reads(b"b"))) == [("read", 1, 1, 1)]
        assert told(diff(reads(b"a"), reads(b"a", 4))) == [("read", 1, 1, 1)]
        assert told(diff(reads(b"a", write=True), reads(b"b", write=True))) == [("write", 1, 1, 1)]
        assert told(diff(reads(b"a"), reads(b"a", write=True))) == [
            ("read", 1, 1, 1), ("write", 1, 1, 1)
        ]  # fmt: skip
        assert diff(reads(b"a"), reads(b"b"), ignored=["read"]).is_same

    def test_are_no_times(self, diff):
        assert diff(request(1, duration=1.0), request(1, duration=2.0)).is_same


class TestWhatIsMissing:
    def test_is_told_apart_from_what_differs(self, diff):
        found = diff(requests(1, 2, 3, 4), requests(1, 2, 9, 3, 4))
        assert (found.compared, found.different, found.only_a, found.only_b) == (4, 0, 0, 1)
        assert told(found) == [("only in B", 1, None, 3)]
        found = diff(requests(1, 2, 3), requests(1, 7, 3))
        assert told(found) == [("request", 1, 2, 2)]
        assert "/0001 2 0 0 0" in found.groups[0].a

    def test_is_never_called_equal(self, diff):
        assert not diff([], []).is_same
        assert not diff([trap(1)], [trap(1)]).is_same
        assert diff([trap(1)], [trap(1)]).unanswered == 1
        assert told(diff([trap(1)], request(1))) == [("outcome", 1, 1, 1)] + [
            (field, 1, 1, 1) for field in ("handler",)
        ]

    def test_is_not_compared_where_it_was_left_out(self, diff):
        def reads(data, more=b"y"):
            accesses = [MemoryAccess("vm", 1, 0, 1, data), MemoryAccess("vm", 1, 9, 1, more, True)]
            return request(1, accesses=accesses)

        found = diff(reads(b"x"), reads(None))
        assert (found.is_same, found.partial) == (True, 1)
        assert told(diff(reads(b"x"), reads(None, b"z"))) == [("write", 1, 1, 1)]

    def test_is_left_out_of_both_where_one_was_redacted(self, tmp_path):
        rules = (RedactionRule("value1"),)
        hidden = msgspec.structs.replace(session(), redaction=rules)
        answered = msgspec.structs.replace(
            reply(1, output="7"), packet=BridgePacket(MAGIC, 1, 1, 7)
        )
        plain = [(1, session()), (2, trap(1, value=7)), (3, answered)]
        one = write_file(tmp_path / "a.mcap", plain)
        other = write_file(tmp_path / "b.mcap", [(1, hidden), (2, trap(1)), (3, reply(1))])
        found = compared(one, other)
        assert (found.is_same, found.partial) == (True, 1)


class TestRetries:
    def test_count_for_nothing(self, diff):
        first = [trap(1), reply(1, WAITING), trap(2), Note("retry", "", "vm", 2, 1)]
        once = [*first, reply(2, retry_of=1)]
        twice = [*first, reply(2, WAITING, retry_of=1), trap(3), reply(3, retry_of=1)]
        found = diff(once, twice)
        assert (found.is_same, found.compared) == (True, 1)
        late = MemoryAccess("vm", 3, 0, 1, b"x")
        assert told(diff(once, [*twice[:-1], late, twice[-1]])) == [("read", 1, 1, 1)]

    def test_that_never_came_are_told(self, diff):
        waits = [trap(1), reply(1, WAITING)]
        found = diff(waits, [*waits, trap(2), reply(2, retry_of=1)])
        assert ("outcome", 1, 1, 1) in told(found)


class TestGroups:
    def test_are_by_handler_method_and_field_in_the_order_of_time(self, diff):
        one, other = [], []
        for seq in range(1, 40):
            method, output = 1 + seq % 2, "changed" if seq > 10 and seq % 2 else "1"
            event = trap(seq, method=method, value=seq)
            one += [event, reply(seq, output="1")]
            other += [event, reply(seq, output=output, error="new" if seq == 20 else None)]
        found = diff(one, other)
        assert told(found) == [("output", 15, 11, 11), ("error", 1, 20, 20)]
        assert found.different == 16

    def test_are_bounded(self, diff, monkeypatch):
        monkeypatch.setattr(comparison, "MAX_DETAILED", 5)
        monkeypatch.setattr(comparison, "_MAX_REMEMBERED", 1)
        found = diff(requests(*range(20)), requests(*range(20)))
        assert found.is_same
        other = [each for seq in range(1, 21) for each in request(seq, value=seq - 1, output="x")]
        found = diff(requests(*range(20)), other)
        assert (found.different, told(found)) == (20, [("output", 5, 1, 1)])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_recording_is_equal_to_itself(path, tmp_path):
    found = compared(path, path)
    assert (found.is_same, found.compared, found.different) == (True, 19, 0)
    record(tmp_path / "again.mcap", Outer if path.stem.endswith("-outside") else Probe)
    # Made by the same guests: of another version, at another time.
    assert compared(path, tmp_path / "again.mcap").is_same


def test_a_vm_may_have_another_name(tmp_path):
    for name in ("a", "b"):
        with NewRecording(tmp_path / name) as recording:
            recording.add_request(BridgePacket(MAGIC, 1, 1), BridgeResponse(1), vm=name)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert (found.compared, found.only_a, found.only_b) == (0, 1, 1)
    assert compared(tmp_path / "a", tmp_path / "b", rename={"a": "b"}).is_same


@pytest.mark.no_cover
def test_one_change_of_one_answer_is_found_where_it_is(tmp_path):
    """A law: whatever else there is, one change is one difference."""
    for seed in range(400 if LONG else 12):
        rng = Random(seed)
        calls = [(rng.randrange(3), rng.randrange(4)) for _ in range(rng.randrange(1, 60))]
        changed = rng.randrange(len(calls))
        paths = [tmp_path / f"{seed}-{side}" for side in "ab"]
        seqs = []
        for side, path in enumerate(paths):
            with NewRecording(path) as recording:
                for number, (vcpu, value) in enumerate(calls):
                    answer = BridgeResponse(value + (side if number == changed else 0))
                    packet = BridgePacket(MAGIC, 1, 1, value)
                    seq = recording.add_request(packet, answer, vcpu=vcpu, time=number)
                    seqs += [seq] if number == changed else []
        found = compared(*paths)
        assert told(found) == [("value1", 1, *seqs)], seed
        assert found.groups[0].vcpu == calls[changed][0]
