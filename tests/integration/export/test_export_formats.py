"""Recordings in the formats of other tools, asked as those tools ask them."""

import json
import sqlite3
from collections import Counter
from contextlib import closing

import duckdb
import msgspec
import pyarrow.parquet as pq
import pytest
from exports import export
from mcap.reader import make_reader
from recorded_session import MAX_U64, STEER, reply, trap, write_file

from vmibridge.bridge.outcome import OutcomeKind


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
