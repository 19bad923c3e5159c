"""JSON lines have all that a recording has; a recording is made of them, or of lines by hand."""

import io
import json
import re
from pathlib import Path

import pytest
from laws import LONG
from recorded_messages import FIELDS, export, read, some_messages
from recorded_session import MAGIC, record, reply, session, trap, write_file

from vmibridge import BridgePacket
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.request import request_in
from vmibridge.errors import RecordingReadError
from vmibridge.recording import json_lines, traps
from vmibridge.recording.export import write_all
from vmibridge.recording.export.jsonl import JsonLines
from vmibridge.recording.export.selected import MISSING
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.json_lines import messages_of_lines
from vmibridge.recording.messages import MemoryAccess, Note, Session
from vmibridge.recording.other_vms import other_vms_text
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import TrapEvent

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.mcap"))


def imported(data):
    return [tuple(each) for each in messages_of_lines(io.BytesIO(data), "lines")]


def refused(data):
    with pytest.raises(RecordingReadError) as error:
        imported(data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_the_law_knows_each_field(kind):
    assert [*FIELDS[kind]] == [*kind.__struct_fields__]


@pytest.mark.no_cover
def test_what_is_exported_and_imported_is_what_was_recorded(tmp_path):
    for seed in range(200 if LONG else 12):
        messages = some_messages(seed, 100)
        path, lines = tmp_path / f"{seed}.mcap", tmp_path / f"{seed}.jsonl"
        recorded = read(write_file(path, messages))
        assert imported(export(path, lines)) == recorded == messages, seed
        path.unlink()
        lines.unlink()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_so_it_is_with_recordings_of_earlier_versions(path, tmp_path):
    assert imported(export(path, tmp_path / "run.jsonl")) == read(path)


def test_so_it_is_where_accesses_are_too_much_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(traps, "_MAX_HELD", 700)
    accesses = [MemoryAccess("vm", 1, at, 4, bytes(4)) for at in range(5)]
    held = [(0, trap(1)), *((1, each) for each in accesses), (2, reply(1)), (3, trap(2))]
    path = write_file(tmp_path / "run.mcap", held)
    lines = export(path, tmp_path / "run.jsonl")
    assert lines.count(b'{"place":') == 3
    assert imported(lines) == held


def test_a_server_with_two_vms_is_read_back(tmp_path):
    record(tmp_path / "run.mcap")
    lines = export(tmp_path / "run.mcap", tmp_path / "run.jsonl")
    assert imported(lines) == read(tmp_path / "run.mcap")
    # In any order of the lines, but for the sessions: a request may take long.
    shuffled = b"".join(reversed(lines.splitlines(keepends=True)))
    assert imported(shuffled) == imported(lines)


class TestASelection:
    def test_has_its_vms_alone(self, tmp_path):
        path = write_file(
            tmp_path / "run.mcap",
            [(0, session("a")), (0, session("b")), (1, trap(1, vm="a")), (2, trap(1, vm="b"))],
            [(3, Note("end", "1 trap", "a")), (4, Note("end", "1 traps", "b"))],
            [(5, reply(9, vm=vm)) for vm in "ab"],
        )
        found = imported(export(path, tmp_path / "run.jsonl", vms=["b"]))
        assert [message.vm for _, message in found] == ["b"] * 5
        less = imported(export(path, tmp_path / "less.jsonl", vms=["b"], vcpus=[0]))
        assert less == found[:4]


class TestLinesByHand:
    def test_need_little(self):
        line = {"seq": 1, "trap": "vmcall", "magic": MAGIC, "request": 3, "values": [1, 2, 3, 4]}
        ((time, event),) = imported(json.dumps(line).encode())
        assert time == 0
        assert type(event) is TrapEvent
        assert request_in(event) == BridgePacket(MAGIC, 3, 0, 1, 2, 3, 4)

    def test_are_in_their_order_and_take_the_time_of_the_line_before(self):
        lines = [
            {"session": {"vm": "vm"}, "time_ns": 5},
            {"seq": 1, "trap": "cpuid", "time": 2.5, "request": 3, "length": 2, "ip": 6,
             "outcome": "handled", "response": [7, None, None, None], "duration_us": 1,
             "memory": [{"address": 1, "size": 2, "data": "ABcd"}]},
            {"note": {"kind": "lost", "text": "?"}},
        ]  # fmt: skip
        found = imported("\n".join(map(json.dumps, lines)).encode())
        taken, answered = 2_500_000_000, 2_500_001_000
        assert [time for time, _ in found] == [5, taken, taken, answered, answered]
        _, (_, event), (_, access), (_, answer), _ = found
        assert access == MemoryAccess("vm", 1, 1, 2, b"\xab\xcd")
        assert (answer.kind, answer.packet) == (OutcomeKind.HANDLED, request_in(event))
        assert (answer.writes.rip, answer.writes.values) == (8, (7, None, None, None))
        assert answer.duration == pytest.approx(1e-6)

    def test_may_be_messages(self):
        event = {"seq": 1, "reason": "vmcall", "registers": {"r8": 5}}
        access = {"vm": "vm", "seq": 1, "address": 0, "size": 1, "data": "00"}
        lines = b'\n{"trap":%s}\n\n{"memory":%s}\n{"summary":{}}' % tuple(
            json.dumps(each).encode() for each in (event, access)
        )
        (_, first), (_, second) = imported(lines)
        assert (first.registers.r8, second.data) == (5, b"\0")


WRONG = {
    b"[]": "is not a JSON object",
    b"{}": "is neither a trap nor a message",
    b'{"session":{"vm":"a"},"note":{}}': "is neither a trap nor a message",
    # What a file has for several traps.
    b'{"plain":{"traps":[]}}': "is neither a trap nor a message",
    b"{": "truncated",
    b'{"a":1e999}': "out of range",
    b"\xff": "",
    b"[" * 100_000: "nested too deeply",
    b'{"seq":1,"trap":"hlt"}': "'hlt'",
    b'{"seq":1,"trap":"msr","vcpus":2}': "there is no field 'vcpus'",
    b'{"seq":1.5,"trap":"msr"}': "int",
    b'{"seq":' + b"9" * 40 + b',"trap":"msr"}': "",
    b'{"seq":1,"trap":"msr","request":1}': "carries no request",
    b'{"seq":1,"trap":"vmcall","request":65536}': "out of range",
    b'{"seq":1,"trap":"msr","outcome":"handled"}': "packet",
    b'{"seq":1,"trap":"vmcall","registers":{"r99":1}}': "there is no field 'r99'",
    b'{"seq":1,"trap":"vmcall","memory":[{"address":1,"size":2,"data":"x"}]}': "not in hex",
    b'{"seq":1,"trap":"vmcall","time_ns":-1}': "is before 1970, or has more than 64 bits",
    b'{"seq":1,"trap":"vmcall","time":1e300}': "1e+300 seconds are more nanoseconds than",
    b'{"seq":1,"trap":"vmcall","place":-1}': "63 bits",
    b'{"seq":1,"trap":"vmcall","place":1,"outcome":"failed"}': "has none",
    b'{"seq":1,"trap":"vmcall","place":1}\n{"seq":2,"trap":"vmcall","place":1}': "the same place",
    b'{"seq":1,"trap":"vmcall","request":1,"outcome":"failed","duration_us":1e308}': "",
    b'{"memory":{"vm":"a","seq":1,"address":1,"size":2,"data":5}}': "in hex",
    b'{"memory":{"vm":"a","seq":1,"address":1,"size":2,"bytes":5}}': "there is no field 'bytes'",
    b'{"session":{"vm":"a","format":99}}': "format 99 is not known",
    b'{"session":{"vm":"a","architecture":{"name":"z80","version":1}}}': "'z80' version 1 is not",
    b'{"note":{"kind":"lost","text":"a","seq":18446744073709551616}}': "",
}  # fmt: skip


@pytest.mark.parametrize(("data", "told"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_line_is_named(data, told):
    message = refused(b"\n" + data)
    assert re.match(r"lines: line [23]: ", message)
    assert told in message


def test_a_line_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE", 100)
    read = []

    class Endless(io.RawIOBase):
        def readline(self, size):
            read.append(size)
            return b"x" * size

    with pytest.raises(RecordingReadError, match="line 1: a line has 100 bytes at most"):
        list(messages_of_lines(Endless(), "lines"))
    assert read == [101]


def test_lines_of_a_part_say_what_they_lack(tmp_path):
    both = [(0, session("red")), (0, session("blue"))]
    for second in (1, 2, 3):
        for at, vm in ((10 * second, "red"), (10 * second + 5, "blue")):
            both += [(at, trap(second, vm=vm, value=second)), (at + 1, reply(second, vm=vm))]
    path = write_file(tmp_path / "run.mcap", both)

    def notes(**words):
        lines = tmp_path / "part.jsonl"
        selection = Selection.parse(**words)
        with JsonLines(lines.open("wb")) as exporter, RecordingReader(path) as reader:
            count = len(list(write_all(exporter, reader, selection)))
        found = imported(lines.read_bytes())
        at = {vm: [m for _, m in found if m.vm == vm] for vm in ("red", "blue")}
        for messages in filter(None, at.values()):
            assert isinstance(messages[0], Session)
        return count, [(m.vm, m.text) for _, m in found if isinstance(m, Note)]

    assert notes() == (6, [])
    assert notes(first=2) == (4, [("red", MISSING), ("blue", MISSING)])
    assert notes(vms=["red"]) == (3, [("red", other_vms_text(["blue"]))])
    assert notes(vms=["blue"], last=2) == (
        2,
        [("blue", other_vms_text(["red"])), ("blue", MISSING)],
    )
    assert notes(requests=["0x77"]) == (0, [])
