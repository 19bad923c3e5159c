"""All that is made of a recording knows what came from outside."""

import json
import sqlite3
from contextlib import closing

import anyio
import msgspec
import pytest
from determinism_parts import ask, record
from outside_parts import Outer, guest_of
from recorded_messages import export, read
from recorded_session import reply, session, trap, write_file

from vmibridge import Bridge, BridgeServer, OutcomeKind
from vmibridge.cli import main
from vmibridge.recording import RecordingReader, recorded_traps
from vmibridge.recording.diff.comparison import compare
from vmibridge.recording.edit.editing import EditOptions, edit
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import FORMAT, Outside, Session
from vmibridge.recording.outside_text import outside_line, plain
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.report.rows import Rows
from vmibridge.recording.selection import Selection
from vmibridge.testing import FakeGuest

SECRET = "the secret of outside"


class Secretive(Outer):
    async def fetch(self, value, pause=0.0):
        if pause:
            await anyio.sleep(pause)
            raise ValueError(SECRET)
        return [SECRET]


def content(path):
    with RecordingReader(path) as reader:
        return b"".join(data for _, data in reader.chunks())


def calls_of(path):
    return [each for _, each in read(path) if isinstance(each, Outside)]


@pytest.fixture
def run(tmp_path):
    """A value, a failure, two at once, one of a request that was told to wait, one cut off."""
    path = tmp_path / "run.mcap"
    packets = [ask(2, 6), ask(6, 2), ask(3, 2), ask(4, 20), ask(5, 1)]
    record(path, {"vm": guest_of(*packets)}, lambda _: Bridge(Outer()))
    return path


class TestRedaction:
    @pytest.mark.parametrize("rule", ["outside", "0x0001:outside", "memory", "value2"])
    def test_of_a_recorder_leaves_out_values_and_failures(self, tmp_path, rule):
        path = tmp_path / "run.mcap"

        async def serve():
            async with (
                Recorder(path, redact=[rule]) as recorder,
                FakeGuest(guest_of(ask(2, 6), ask(9, 2))) as vm,
            ):
                async for _ in BridgeServer(vm, Bridge(Secretive()), taps=[recorder]).run():
                    pass

        anyio.run(serve)
        assert SECRET.encode() not in content(path)
        calls = calls_of(path)
        assert [(each.key, each.left_out) for each in calls] == [("one", True), ("uncaught", True)]

    @pytest.mark.parametrize("rule", ["outside", "1:outside", "memory", "value2"])
    def test_of_an_edit_does_the_same(self, tmp_path, rule):
        path, target = tmp_path / "run.mcap", tmp_path / "edited.mcap"
        record(path, {"vm": guest_of(ask(2, 6), ask(9, 2))}, lambda _: Bridge(Secretive()))
        assert content(path).count(SECRET.encode()) >= 3
        edit([path], target, EditOptions(redact=(rule,)))
        assert SECRET.encode() not in content(target)
        assert [each.left_out for each in calls_of(target)] == [True, True]

    def test_of_another_request_leaves_it(self, tmp_path):
        path, target = tmp_path / "run.mcap", tmp_path / "edited.mcap"
        record(path, {"vm": guest_of(ask(2, 6))}, lambda _: Bridge(Secretive()))
        edit([path], target, EditOptions(redact=("0x0002:outside",)))
        assert calls_of(target) == calls_of(path)

    def test_of_an_old_recording_is_none_that_its_readers_do_not_know(self, tmp_path):
        path, target = tmp_path / "old.mcap", tmp_path / "edited.mcap"
        write_file(path, [(1, session()), (2, trap(1)), (3, reply(1))])
        edit([path], target, EditOptions(redact=("outside", "memory")))
        (told,) = (each for _, each in read(target) if isinstance(each, Session))
        assert told.format == FORMAT
        assert [each.what for each in told.redaction] == ["memory"]

    def test_is_said_in_the_session(self, tmp_path, run):
        target = tmp_path / "edited.mcap"
        edit([run], target, EditOptions(redact=("outside",)))
        (told,) = (each for _, each in read(target) if isinstance(each, Session))
        assert [str(each) for each in told.redaction] == ["outside"]
        assert all(each.left_out or each.is_cut_off for each in calls_of(target))


class TestEdit:
    def test_keeps_the_calls_of_what_it_keeps(self, run, tmp_path):
        target = tmp_path / "edited.mcap"
        edit([run], target, EditOptions(Selection.parse(methods=["4"]), {"vm": "other"}))
        assert [(each.vm, each.key) for each in calls_of(target)] == [("other", "slow")]


class TestJsonLines:
    def test_have_all_of_it(self, run, tmp_path):
        lines = export(run, tmp_path / "run.jsonl")
        (tmp_path / "lines").write_bytes(lines)
        assert main(["import", str(tmp_path / "lines"), "-o", str(tmp_path / "again.mcap")]) == 0
        assert read(tmp_path / "again.mcap") == read(run)
        first = json.loads(lines.splitlines()[1])
        assert [(each["key"], each["data"]) for each in first["outside"]] == [("one", "06")]

    @pytest.mark.parametrize(
        "line",
        [
            b'{"outside":{"vm":"vm","seq":1}}',
            b'{"outside":{"vm":"vm","seq":1,"key":"k","data":"zz"}}',
            b'{"outside":{"vm":"vm","seq":1,"key":"k","other":1}}',
            b'{"seq":1,"trap":"vmcall","outside":[{"key":1}]}',
            b'{"seq":1,"trap":"vmcall","outside":[{"key":"k","data":"0"}]}',
        ],
    )
    def test_that_are_wrong_are_refused(self, line, tmp_path, capsys):
        (tmp_path / "lines").write_bytes(line)
        assert main(["import", str(tmp_path / "lines"), "-o", str(tmp_path / "new.mcap")]) == 2
        assert "line 1: " in capsys.readouterr().err
        assert not (tmp_path / "new.mcap").exists()


class TestWhatPeopleSee:
    def test_inspect_shows_each_call(self, run, capsys):
        assert main(["inspect", str(run), "--full"]) == 0
        told = [
            line.strip() for line in capsys.readouterr().out.splitlines() if " outside '" in line
        ]
        assert told[:2] == [
            "outside 'one': 6",
            "outside 'fails': failed: ConnectionResetError: gone",
        ]
        assert "outside 'same' #1: 0.002" in told

    def test_a_page_has_them(self, run, tmp_path):
        assert main(["report", str(run), "-o", str(tmp_path / "run.html")]) == 0
        with RecordingReader(run) as reader:
            rows = Rows()
            for place, trap in enumerate(recorded_traps(reader.messages()), 1):
                rows.add(trap, place, 0)
        columns = dict(rows.columns())
        assert "'fails': failed: ConnectionResetError: gone" in columns["texts"]
        assert set(columns) >= {"outside", "output"}

    def test_a_table_has_them(self, run, tmp_path):
        export(run, tmp_path / "run.sqlite", "sqlite")
        with closing(sqlite3.connect(tmp_path / "run.sqlite")) as tables:
            found = [row[0] for row in tables.execute("SELECT outside FROM traps ORDER BY seq")]
        assert json.loads(found[0]) == [{"key": "one", "number": 0, "value": 6}]
        assert json.loads(found[1])[0]["types"][0] == "ConnectionResetError"

    @pytest.mark.parametrize("to", ["foxglove", "perfetto", "parquet"])
    def test_other_tools_get_them(self, run, tmp_path, to):
        assert export(run, tmp_path / f"run.{to}", to)

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"\xc0", None),
            (b"", ""),
            (b"\xc1", "c1"),
            (b"\x81\x01\xc4\x01a", {"1": "61"}),
            (b"\xcb\x7f\xf0" + bytes(6), "inf"),
            (b"\xd6\xff" + bytes(4), None),
            (b"\x91" * 5000, None),
            (b"\x91" * 100 + b"\x01", None),
        ],
        ids=range(8),
    )
    def test_whatever_a_file_says_is_text(self, data, told):
        found = plain(data)
        assert msgspec.json.encode(found)
        assert told is None or found == told
        assert len(outside_line(Outside("vm", 1, "\n" * 9999, 7, data))) < 2000


class TestDiff:
    def difference(self, tmp_path, one, other):
        paths = []
        for name, calls in (("a", one), ("b", other)):
            paths.append(tmp_path / f"{name}.mcap")
            paths[-1].unlink(missing_ok=True)
            messages = [session(), trap(1), *calls, reply(1), trap(2), reply(2)]
            write_file(paths[-1], list(enumerate(messages, 1)))
        with RecordingReader(paths[0]) as a, RecordingReader(paths[1]) as b:
            found = compare(a, b, selection=Selection(), rename={})
        return [(each.field, each.a, each.b) for each in found.groups]

    def test_finds_another_value(self, tmp_path):
        one = [Outside("vm", 1, "k", 0, b"\x01"), Outside("vm", 1, "l", 0, b"\x01")]
        other = [Outside("vm", 1, "k", 0, b"\x02"), Outside("vm", 1, "l", 0, b"\x01")]
        assert self.difference(tmp_path, one, one) == []
        assert self.difference(tmp_path, one, one[::-1]) == [], "in any order"
        found = self.difference(tmp_path, one, other)
        assert found == [("outside", "'k': 1; 'l': 1", "'k': 2; 'l': 1")]
        assert self.difference(tmp_path, one, [])[0][2] == "none"

    def test_finds_that_of_a_request_that_was_told_to_wait(self, tmp_path):
        def made(name, value):
            path = tmp_path / name
            messages = [
                session(),
                trap(1),
                reply(1, OutcomeKind.WAITING),
                Outside("vm", 1, "k", 0, value),
                trap(2),
                reply(2, retry_of=1),
            ]
            return write_file(path, list(enumerate(messages, 1)))

        with (
            RecordingReader(made("a.mcap", b"\x01")) as a,
            RecordingReader(made("b.mcap", b"\x02")) as b,
        ):
            found = compare(a, b, selection=Selection(), rename={})
        assert [each.field for each in found.groups] == ["outside"]


def test_what_is_too_much_to_hold_is_given_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("vmibridge.recording.traps._MAX_HELD", 1000)
    calls = [Outside("vm", 1, "k", number, bytes(300)) for number in range(5)]
    timed = [TimedMessage(at, each) for at, each in enumerate([trap(1), *calls, reply(1)])]
    others = []
    (found,) = recorded_traps(timed, lambda place, _: others.append(place))
    assert (len(found.outside), found.left_out, others) == (1, 4, [2, 3, 4, 5])
