"""Recordings in the formats of other tools, asked as those tools ask them."""

import json
import sqlite3
import stat
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import duckdb
import msgspec
import pyarrow.parquet as pq
import pytest
from mcap.reader import make_reader
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from recorded_session import MAX_U64, STEER, record, reply, session, trap, write_file

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError, MissingExtraError, RecordingError
from vmibridge.recording.export import FORMATS, Export, target_of
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Note
from vmibridge.recording.selection import Selection
from vmibridge.recording.traps import recorded_traps
from vmibridge.vm.trap import RegisterWrites

BEGIN, END, INSTANT = (
    getattr(TrackEvent, f"TYPE_{word}") for word in ("SLICE_BEGIN", "SLICE_END", "INSTANT")
)
# Numbers that no recorder writes, but that a file may hold.
HOSTILE = [
    (0, session("\0")),
    (MAX_U64, trap(-1, vm="\0", vcpu=-(1 << 63), value=-1)),
    (MAX_U64, MemoryAccess("\0", -1, -1, -1, None, True, "\x1b")),
    (
        0,
        reply(
            -1, vm="\0", writes=RegisterWrites(-1, -1, MAX_U64), retry_of=-1, duration=float("nan")
        ),
    ),
    (5, trap(MAX_U64, vcpu=MAX_U64, value=MAX_U64)),
    (1, reply(MAX_U64, OutcomeKind.WAITING, duration=float("inf"), retry_of=MAX_U64)),
    (9, Note("lost", "\0", None, -1, MAX_U64)),
]


def export(path, name, target=None, **words):
    target = target or target_of(path, name)
    with RecordingReader(path) as reader:
        job = Export(reader, name, target, Selection.parse(**words))
        count = sum(1 for _ in job.write())
    return count, job.targets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file, the outcomes of the server, and the traps as the reader has them."""
    path = tmp_path_factory.mktemp("run") / "run.mcap"
    outcomes = record(path)
    with RecordingReader(path) as reader:
        traps = list(recorded_traps(reader.messages()))
    assert len(traps) == len(outcomes)
    return path, outcomes, traps


@pytest.fixture(scope="module")
def exported(run):
    return {name: export(run[0], name)[1] for name in FORMATS}


def by_outcome(run):
    return Counter(outcome.kind.value for outcome in run[1])


def bytes_read(run):
    return sum(
        len(access.data) for trap in run[2] for access in trap.accesses
        if access.data is not None and not access.write
    )  # fmt: skip


class TestJsonLines:
    @pytest.fixture
    def lines(self, exported):
        lines = map(json.loads, exported["jsonl"][0].read_bytes().splitlines())
        return [line for line in lines if "seq" in line]

    def test_have_a_line_a_trap(self, run, lines):
        assert Counter(line["outcome"] for line in lines) == by_outcome(run)
        assert [line["time_ns"] for line in lines] == [trap.time for trap in run[2]]
        assert min(line["time"] for line in lines) == 0

    def test_have_everything_of_a_trap(self, run, lines):
        for line, each in zip(lines, run[2], strict=True):
            assert line["values"] == list(each.packet.values)
            assert line["registers"] == msgspec.to_builtins(each.event.registers)
            assert line["retry_of"] == each.reply.retry_of
            data = [None if a.data is None else a.data.hex() for a in each.accesses]
            assert [access.get("data") for access in line["memory"]] == data

    def test_keep_what_a_guest_said_as_it_is(self, lines):
        assert json.loads(next(line["output"] for line in lines if line["output"])) == {
            "said": STEER
        }


class TestFoxglove:
    @pytest.fixture
    def found(self, exported):
        """Schema, topic and time of each message, and the message."""
        (path,) = exported["foxglove"]
        with path.open("rb") as file:
            return [
                (json.loads(schema.data), channel, message.log_time, json.loads(message.data))
                for schema, channel, message in make_reader(file).iter_messages()
            ]

    def test_has_the_lines_of_jsonl_at_the_times_of_the_traps(self, exported, found):
        lines = [json.loads(line) for line in exported["jsonl"][0].read_bytes().splitlines()]
        lines = [line for line in lines if "trap" in line]
        traps = [each for each in found if each[1].topic == "trap"]
        assert [line for *_, line in traps] == sorted(lines, key=lambda line: line["time_ns"])
        assert [time for _, _, time, _ in traps] == [line["time_ns"] for *_, line in traps]
        assert {each[1].message_encoding for each in found} == {"json"}

    def test_has_sessions_and_notes_between_the_traps(self, run, found):
        others = Counter(channel.topic for _, channel, _, _ in found if channel.topic != "trap")
        assert others["session"] == 2
        assert others["note"] >= 2
        first, last = min(trap.time for trap in run[2]), max(trap.time for trap in run[2])
        assert all(first <= time <= last for _, _, time, _ in found)

    def test_has_schemas_of_the_words_that_foxglove_knows(self, found):
        def check(value, schema, path):
            assert set(schema) <= {"type", "properties", "items"}
            words = {"object": dict, "array": list, "string": str, "boolean": bool}
            kind = words.get(schema["type"], (int, float))
            assert value is None or isinstance(value, kind), (path, value)
            if isinstance(value, dict) and schema["properties"]:
                assert set(value) <= set(schema["properties"])
                for name, each in value.items():
                    check(each, schema["properties"][name], f"{path}.{name}")
            elif isinstance(value, list):
                for each in value:
                    check(each, schema["items"], f"{path}[]")

        assert found
        for schema, channel, _, message in found:
            check(message, schema, channel.topic)


class TestSqlite:
    @pytest.fixture
    def ask(self, exported):
        with closing(sqlite3.connect(exported["sqlite"][0])) as database:
            yield lambda question: database.execute(question).fetchall()

    def test_counts_by_outcome(self, run, ask):
        rows = ask("SELECT outcome, count(*) FROM traps GROUP BY outcome")
        assert dict(rows) == by_outcome(run)

    def test_the_slowest(self, run, ask):
        slowest = max(outcome.duration for outcome in run[1])
        ((duration,),) = ask("SELECT duration_us FROM traps ORDER BY duration_us DESC LIMIT 1")
        assert duration == pytest.approx(slowest * 1e6)

    def test_bytes_read(self, run, ask):
        question = "SELECT sum(length(data)) FROM accesses WHERE NOT write"
        assert ask(question) == [(bytes_read(run),)]

    def test_accesses_belong_to_their_traps(self, run, ask):
        question = (
            "SELECT t.vm, t.seq, a.place, a.data FROM accesses a JOIN traps t USING (trap)"
            " ORDER BY trap, place"
        )
        assert ask(question) == [
            (trap.event.vm, trap.event.seq, place, access.data)
            for trap in run[2]
            for place, access in enumerate(trap.accesses)
        ]

    def test_numbers_of_64_bits_are_found_by_their_bits(self, run, ask):
        count = sum(outcome.packet.value1 == MAX_U64 for outcome in run[1])
        assert ask("SELECT count(*) FROM traps WHERE value1 = 0xffffffffffffffff") == [(count,)]
        assert ask("SELECT DISTINCT value1, value3 & 0xff FROM traps WHERE value3 < 0") == [
            (-1, 254)
        ]
        assert ask(
            "SELECT DISTINCT value1, value3, value4, answer1, answer4 FROM traps_hex"
            f" WHERE value1 = '{MAX_U64:#x}'"
        ) == [(hex(MAX_U64), hex(MAX_U64 - 1), hex(1 << 63), hex(MAX_U64), None)]
        assert ask("SELECT address, error FROM accesses_hex WHERE error IS NOT NULL") == [
            ("0xfffffffffffff000", "not mapped")
        ]

    def test_sessions_handlers_and_notes_are_there(self, run, ask):
        assert ask("SELECT vm FROM sessions ORDER BY vm") == [("blue",), ("red",)]
        assert ask("SELECT DISTINCT name, request FROM handlers WHERE name = 'probe'") == [
            ("probe", 1)
        ]
        ends = ask("SELECT vm, json_extract(counts, '$.handled') FROM notes WHERE kind = 'end'")
        handled = Counter(o.event.vm for o in run[1] if o.kind is OutcomeKind.HANDLED)
        assert dict(ends) == handled

    def test_registers_are_json(self, ask):
        assert ask("SELECT DISTINCT json_extract(registers, '$.cr3') FROM traps") == [(0x7000,)]


class TestParquet:
    @pytest.fixture
    def ask(self, exported):
        traps, memory = exported["parquet"]
        with duckdb.connect() as database:
            database.read_parquet(str(traps)).create_view("traps")
            database.read_parquet(str(memory)).create_view("accesses")
            yield lambda question: database.execute(question).fetchall()

    def test_has_two_files(self, exported):
        assert [path.name for path in exported["parquet"]] == ["run.parquet", "run.memory.parquet"]

    def test_counts_by_outcome(self, run, ask):
        rows = ask("SELECT outcome, count(*) FROM traps GROUP BY outcome")
        assert dict(rows) == by_outcome(run)

    def test_the_slowest(self, run, ask):
        ((duration,),) = ask("SELECT max(duration_us) FROM traps")
        assert duration == pytest.approx(max(outcome.duration for outcome in run[1]) * 1e6)

    def test_bytes_read(self, run, ask):
        question = "SELECT sum(octet_length(data)) FROM accesses WHERE NOT write"
        assert ask(question) == [(bytes_read(run),)]

    def test_accesses_belong_to_their_traps(self, run, ask):
        rows = ask("SELECT seq, count(*) FROM accesses JOIN traps USING (trap) GROUP BY vm, seq")
        counts = [(trap.event.seq, len(trap.accesses)) for trap in run[2] if trap.accesses]
        assert sorted(rows) == sorted(counts)

    def test_numbers_of_64_bits_have_no_sign(self, ask):
        ((value1, value3, answer1),) = ask(
            "SELECT DISTINCT value1, value3, answer1 FROM traps WHERE value4 = 9223372036854775808"
        )
        assert (value1, value3, answer1) == (MAX_U64, MAX_U64 - 1, MAX_U64)

    @pytest.mark.no_cover
    def test_is_written_by_row_groups(self, tmp_path):
        chunks = [range(first, first + 10_000) for first in range(1, 60_000, 10_000)]
        messages = [[(n, each(n)) for n in chunk for each in (trap, reply)] for chunk in chunks]
        path = write_file(tmp_path / "many.mcap", *messages)
        _, (target, _) = export(path, "parquet")
        file = pq.ParquetFile(target)
        groups = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
        assert groups == [50_000, 10_000]


class Timeline:
    """A Perfetto trace, taken apart by what its schema says."""

    def __init__(self, path):
        self.trace = Trace()
        self.trace.ParseFromString(path.read_bytes())
        self.tracks = {}
        names = {}
        events = []
        for packet in self.trace.packet:
            if packet.HasField("track_descriptor"):
                descriptor = packet.track_descriptor
                assert descriptor.uuid not in self.tracks
                self.tracks[descriptor.uuid] = descriptor
            for each in packet.interned_data.debug_annotation_names:
                assert packet.sequence_flags == packet.SEQ_INCREMENTAL_STATE_CLEARED
                names[each.iid] = each.name
            if packet.HasField("track_event"):
                assert packet.sequence_flags == packet.SEQ_NEEDS_INCREMENTAL_STATE
                assert packet.track_event.track_uuid in self.tracks, "described before it is used"
                events.append((packet.timestamp, packet.track_event))
        # A trace processor sorts by time, and keeps the order of what has the same time.
        self.events = sorted(events, key=lambda event: event[0])
        self.names = names

    def place(self, event):
        thread = self.tracks[event.track_uuid]
        process = self.tracks[thread.parent_uuid]
        assert thread.thread.pid == process.process.pid
        return process.process.process_name, thread.thread.thread_name

    def facts(self, event):
        return {
            self.names[each.name_iid]: getattr(each, each.WhichOneof("value"))
            for each in event.debug_annotations
        }

    def slices(self):
        """Place, begin, end and event of each slice; they must nest, one deep."""
        opened, found = {}, []
        for time, event in self.events:
            place = self.place(event)
            if event.type == BEGIN:
                assert place not in opened
                opened[place] = time, event
            elif event.type == END:
                found.append((place, opened[place][0], time, opened.pop(place)[1]))
        assert not opened
        return found


@pytest.fixture(scope="module")
def timeline(exported):
    return Timeline(exported["perfetto"][0])


class TestPerfetto:
    def test_a_vm_is_a_process_and_a_vcpu_a_thread(self, timeline):
        places = {timeline.place(event) for _, event in timeline.events}
        assert places == {("red", "vcpu 0"), ("red", "vcpu 1"), ("blue", "vcpu 0")}
        threads = [t.thread.tid for t in timeline.tracks.values() if t.HasField("thread")]
        processes = [t.process.pid for t in timeline.tracks.values() if t.HasField("process")]
        assert len({*threads, *processes}) == 5

    def test_a_trap_is_a_slice_from_taking_it_to_its_reply(self, run, timeline):
        told = [
            (place, begin, end, event.categories[0], timeline.facts(event)["seq"])
            for place, begin, end, event in timeline.slices()
        ]
        assert sorted(told) == sorted(
            (
                (trap.event.vm, f"vcpu {trap.event.vcpu}"),
                trap.time,
                trap.reply_time,
                trap.reply.kind.value,
                trap.event.seq,
            )
            for trap in run[2]
        )

    def test_slices_have_the_names_of_handlers_and_methods(self, run, timeline):
        names = {event.name for *_, event in timeline.slices()}
        methods = ("add", "copy", "fail", "miss", "slow", "give_up")
        assert names == {*[f"probe/{method}" for method in methods], "0x7777/0x0001"}

    def test_slices_say_what_was_asked_and_answered(self, timeline):
        facts = [timeline.facts(event) for *_, event in timeline.slices()]
        added = next(each for each in facts if each["method"] == 1 and each["request"] == 1)
        assert (added["value1"], added["value3"], added["answer1"]) == (
            MAX_U64,
            MAX_U64 - 1,
            MAX_U64,
        )
        copied = next(each for each in facts if each["method"] == 2)
        assert (copied["bytes read"], copied["bytes written"]) == (16, 4)

    def test_retries_are_one_flow(self, run, timeline):
        flows = {}
        for *_, event in timeline.slices():
            for ends, ids in ((False, event.flow_ids), (True, event.terminating_flow_ids)):
                for flow in ids:
                    flows.setdefault(flow, []).append((timeline.place(event)[0], ends))
        assert len(flows) == 2
        for steps in flows.values():
            assert len({vm for vm, _ in steps}) == 1
            assert [ends for _, ends in steps] == [False] * (len(steps) - 1) + [True]
        retried = [o for o in run[1] if o.retry_of or o.kind is OutcomeKind.WAITING]
        assert sum(map(len, flows.values())) == len(retried)

    def test_times_are_those_of_a_clock(self, run, timeline):
        clocks = timeline.trace.packet[0].clock_snapshot.clocks
        start = min(trap.time for trap in run[2])
        assert {clock.clock_id: clock.timestamp for clock in clocks} == {1: start, 6: start}

    def test_a_trap_without_a_reply_is_an_instant(self, tmp_path):
        path = write_file(
            tmp_path / "x.mcap", [(5, session()), (7, trap(1)), (9, trap(2)), (11, reply(2))]
        )
        _, (target,) = export(path, "perfetto")
        timeline = Timeline(target)
        assert [(time, event.type) for time, event in timeline.events] == [
            (7, INSTANT), (9, BEGIN), (11, END)
        ]  # fmt: skip

    def test_slices_nest_whatever_the_times(self, tmp_path):
        chunk = [(10, trap(1)), (12, trap(2)), (20, reply(1)), (5, reply(2))]
        _, (target,) = export(write_file(tmp_path / "x.mcap", chunk), "perfetto")
        assert [(begin, end) for _, begin, end, _ in Timeline(target).slices()] == [
            (10, 20), (20, 20)
        ]  # fmt: skip


class TestAnyFormat:
    @pytest.mark.parametrize("name", FORMATS)
    def test_takes_the_traps_that_are_selected(self, run, name, tmp_path):
        count, _ = export(run[0], name, tmp_path / "x", outcomes=["failed"], vms=["red"])
        assert count == sum(o.kind.value == "failed" and o.event.vm == "red" for o in run[1])

    @pytest.mark.parametrize("name", FORMATS)
    def test_numbers_of_a_file_end_no_export(self, name, tmp_path):
        path = write_file(tmp_path / "x.mcap", HOSTILE)
        assert export(path, name)[0] == 2

    @pytest.mark.parametrize("name", FORMATS)
    def test_a_recording_without_traps_makes_a_file(self, name, tmp_path):
        count, targets = export(write_file(tmp_path / "x.mcap", [(1, session())]), name)
        assert count == 0
        assert all(path.exists() for path in targets)

    @pytest.mark.parametrize("name", FORMATS)
    def test_what_can_be_read_of_a_damaged_file_is_there(self, name, tmp_path):
        path = write_file(tmp_path / "x.mcap", *[[(n, trap(n)), (n, reply(n))] for n in (1, 2, 3)])
        with RecordingReader(path) as reader:
            places = [offset for offset, _ in reader.chunks()]
        data = bytearray(path.read_bytes())
        data[places[1] + 60] ^= 0xFF
        path.write_bytes(data)
        assert export(path, name)[0] == 2

    @pytest.mark.parametrize("name", FORMATS)
    def test_is_for_its_owner_only_as_a_recording_is(self, exported, name):
        assert {stat.S_IMODE(path.stat().st_mode) for path in exported[name]} == {0o600}

    @pytest.mark.parametrize("name", FORMATS)
    def test_leaves_nothing_when_it_is_stopped(self, run, name, tmp_path):
        with RecordingReader(run[0]) as reader:
            job = Export(reader, name, tmp_path / "x", Selection()).write()
            next(job)
            assert {path.suffix for path in tmp_path.iterdir()} == {".part"}
            job.close()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", FORMATS)
    def test_never_takes_the_place_of_a_file(self, run, name, tmp_path):
        target = tmp_path / "x.out"
        target.write_text("mine")
        with pytest.raises(ConfigError, match="already exists"):
            export(run[0], name, target)

    @pytest.mark.parametrize("name", FORMATS)
    def test_nor_of_one_that_comes_up_meanwhile(self, run, name, tmp_path):
        with RecordingReader(run[0]) as reader:
            export = Export(reader, name, tmp_path / "x", Selection())
            job = export.write()
            next(job)
            export.targets[-1].write_text("mine")
            with pytest.raises(ConfigError, match="already exists"):
                list(job)
        assert list(tmp_path.iterdir()) == [export.targets[-1]]
        assert export.targets[-1].read_text() == "mine"

    @pytest.mark.parametrize("name", FORMATS)
    def test_does_without_links_where_there_are_none(self, run, name, tmp_path, monkeypatch):
        def hardlink_to(self, target):
            raise PermissionError

        monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
        _, targets = export(run[0], name, tmp_path / "x")
        assert sorted(tmp_path.iterdir()) == sorted(targets)

    @pytest.mark.parametrize("name", FORMATS)
    def test_tells_that_it_cannot_be_written(self, run, name, tmp_path):
        with pytest.raises(RecordingError, match=r"none/x.*: No such file"):
            export(run[0], name, tmp_path / "none" / "x")

    @pytest.mark.parametrize(
        ("name", "module"), [("perfetto", "perfetto.protos"), ("parquet", "pyarrow")]
    )
    def test_tells_which_extra_is_missing(self, run, name, module, monkeypatch):
        for loaded in [each for each in sys.modules if each.startswith(module)]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.delitem(sys.modules, f"vmibridge.recording.export.{name}", raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=f"the extra '{name}'"):
            target_of(run[0], name)
