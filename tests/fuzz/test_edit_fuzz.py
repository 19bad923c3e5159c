"""Edit, diff and import of what was damaged, made by chance, or made to hurt.

A command ends with a status and, where it is 2, one line. What it makes can be read. Memory stays
bounded.
"""

import contextlib
import io
import json
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from laws import LONG
from recorded_messages import export, read, some_messages
from recorded_session import record, reply, trap, write_file

from vmibridge import OutcomeKind
from vmibridge.cli import main
from vmibridge.errors import ConfigError, RecordingError, RecordingReadError
from vmibridge.recording import MemoryAccess, RecordingReader, vm_names
from vmibridge.recording.diff.comparison import compare
from vmibridge.recording.edit.editing import EditOptions, edit
from vmibridge.recording.json_lines import messages_of_lines
from vmibridge.recording.new_recording import NewRecording
from vmibridge.recording.selection import Selection

# The same lines, for every example: other tests show that they are covered.
pytestmark = pytest.mark.no_cover

MAX_MEMORY = 128 << 20
SECOND = 10**9


def options_of(rng):
    def some(nothing, *more):
        return rng.choice(more) if rng.random() < 0.2 else nothing

    return EditOptions(
        Selection.parse(
            vms=some([], ["vm"], ["red", "vm"]),
            vcpus=some([], [0, 1]),
            requests=some([], ["1", "probe"]),
            outcomes=some([], ["handled", "none"]),
            since=some(None, "0", "1970-01-01"),
            until=some(None, "1", "2100-01-01"),
        ),
        some({}, {"vm": "red"}, {"vm": "x", "red": "y"}),
        some((), ("memory",), ("1:value1", "value3")),
        some(0, SECOND, -SECOND),
        some(None, "vm", SECOND, 1 << 60),
    )


def damaged(data, rng):
    data = bytearray(data)
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randrange(100)]
    return bytes(data)


def test_edits_and_comparisons_raise_errors_of_recordings_alone(tmp_path):
    made = 0
    for seed in range(200 if LONG else 30):
        rng = Random(seed)
        paths = [tmp_path / f"{seed}{side}.mcap" for side in "ab"]
        for path in paths:
            write_file(path, some_messages(rng.random(), 30))
            path.write_bytes(damaged(path.read_bytes(), rng))
        with contextlib.suppress(ConfigError, RecordingReadError):
            sources = paths[: rng.choice([1, 1, 2])]
            done = edit(sources, tmp_path / f"{seed}.mcap", options_of(rng))
            for name, counts in done.files.items():
                assert len(read(Path(name))) == sum(counts.values()) > 0
                made += 1
        with (
            contextlib.suppress(RecordingReadError),
            RecordingReader(paths[0]) as one,
            RecordingReader(paths[1]) as other,
        ):
            compare(one, other, selection=options_of(rng).selection, rename={})
        for path in tmp_path.iterdir():
            path.unlink()
    assert made > 5


PIECES = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"-1", b"1e400", b"18446744073709551616",
    b"\xff", b"\0", b"\n", b'"\\ud800"', b'"seq":', b'"place":0', b'"vm":7', b'{"trap":{}}',
    b'{"session":{"vm":"vm","architecture":{"name":"x86","version":9}}}\n', b'"time_ns":-1',
    b"[" * 2000,
]  # fmt: skip


def changed(lines, rng):
    data = bytearray(lines)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(3)
        if how == 0:
            data[at:at] = rng.choice(PIECES)
        elif how == 1:
            del data[at : at + rng.randrange(40)]
        else:
            other = rng.randrange(len(data) + 1)
            data[at : at + 20] = data[other : other + 20]
    return bytes(data)


def test_lines_are_a_recording_or_one_line_of_an_error(tmp_path):
    record(tmp_path / "run.mcap")
    whole = export(tmp_path / "run.mcap", tmp_path / "run.jsonl").splitlines(keepends=True)
    good = bad = 0
    for seed in range(800 if LONG else 60):
        rng = Random(seed)
        lines = changed(b"".join(rng.sample(whole, rng.randrange(1, 4))), rng)
        target = tmp_path / f"{seed}.mcap"
        try:
            with NewRecording(target) as recording:
                for time, message in messages_of_lines(io.BytesIO(lines), "lines"):
                    recording.copy(time, message)
        except RecordingError:
            assert not target.exists()
            bad += 1
        else:
            assert len(read(target)) == sum(recording.counts.values())
            target.unlink()
            good += 1
    assert good > 5
    assert bad > 5


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 1_000_000,
        b'{"note":' * 100_000,
        b'{"seq":1,"trap":"msr","vm":"' + b"\\u202e\n" * 1000,
        b'{"seq":1,"trap":"\xf0\x9f\x98\x80\\u202e\\n"}',
        b'{"\\u202e\\n":1,"seq":1,"trap":"msr"}',
        b'{"seq":' + b"9" * 100_000 + b',"trap":"msr"}',
    ],
    ids=["deep", "deeper", "open", "steering", "field", "digits"],
)
def test_an_error_is_one_line_that_steers_no_terminal(tmp_path, capsys, line):
    (tmp_path / "x.jsonl").write_bytes(line)
    assert main(["import", str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "x.mcap")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("vmibridge: ")
    assert told.isprintable()
    assert len(told) < 1000


def peak(use):
    tracemalloc.start()
    try:
        use()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_where_a_request_is_open_for_all_of_the_file(tmp_path):
    # The first trap is answered last, so its line is the last one.
    lines = [{"place": at, "seq": at, "trap": "vmcall", "memory": [], "output": "x" * 1000}
             for at in range(1, 4000)]  # fmt: skip
    data = b"".join(
        json.dumps(each).encode() + b"\n" for each in [*lines, {**lines[0], "place": 0}]
    )

    def use():
        for _ in messages_of_lines(io.BytesIO(data), "lines"):
            pass

    assert peak(use) < 8 << 20


def test_memory_is_bounded_where_a_file_has_much(tmp_path):
    accesses = [(1, MemoryAccess("vm", 1, 0, 1 << 20, bytes(1 << 20))) for _ in range(64)]
    chunks = [[each] for each in accesses]
    path = write_file(tmp_path / "a.mcap", [(1, trap(1))], *chunks, [(2, reply(1))])
    copy = tmp_path / "b.mcap"
    assert peak(lambda: edit([path], copy, EditOptions(Selection.parse(vcpus=[0])))) < MAX_MEMORY
    assert read(copy) == read(path)

    def use():
        with RecordingReader(path) as one, RecordingReader(copy) as other:
            assert compare(one, other, selection=Selection(), rename={}).compared == 1

    assert peak(use) < MAX_MEMORY


def test_names_are_held_once_however_long_they_are(tmp_path):
    name = "x" * (1 << 20)
    chunks = [
        [(seq, trap(seq, vm=name)), (seq, reply(seq, OutcomeKind.WAITING, vm=name, output=name))]
        for seq in range(1, 49)
    ]
    path = write_file(tmp_path / "a.mcap", *chunks)
    options = EditOptions(Selection.parse(vcpus=[0]))
    assert peak(lambda: edit([path], tmp_path / "b.mcap", options)) < 32 << 20

    def use():
        with RecordingReader(path) as one, RecordingReader(path) as other:
            assert compare(one, other, selection=Selection(), rename={}).compared == 48

    assert peak(use) < 32 << 20


@pytest.mark.parametrize("limit", ["MAX_VMS", "_MAX_CHARACTERS"])
def test_vms_are_not_without_number(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(vm_names, limit, 3)
    path = write_file(tmp_path / "a.mcap", [(1, trap(1, vm=vm)) for vm in "abcde"])
    with pytest.raises(RecordingReadError, match="there are more than"):
        edit([path], tmp_path / "b.mcap", EditOptions())
    with (
        RecordingReader(path) as one,
        RecordingReader(path) as other,
        pytest.raises(RecordingReadError, match="there are more than"),
    ):
        compare(one, other, selection=Selection(), rename={})
