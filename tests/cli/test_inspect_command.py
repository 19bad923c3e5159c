"""`vmibridge inspect` and `vmibridge export`: what they print, what they make, how they exit."""

import json
import shlex
import signal
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from children import run as run_child
from probe_guest import PAUSE, command
from recorded_session import STEER, record, reply, session, trap, write_file

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Note

PRINTING = [["inspect"], ["export", "--to", "jsonl", "-o", "-"]]
HEADER = [
    *("time", "seq", "vcpu", "trap", "handler", "magic/request/method"),
    *("outcome", "answer", "us", "output"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file, and the outcomes of the server."""
    path = tmp_path_factory.mktemp("run") / "run.mcap"
    return path, record(path)


@pytest.fixture
def hand_made(tmp_path):
    """Three chunks of ten traps each, a second from one to the next, then one without a reply."""
    chunks = [
        [(n * 10**9, each(n)) for n in range(first, first + 10) for each in (trap, reply)]
        for first in (1, 11, 21)
    ]
    return write_file(tmp_path / "made.mcap", [(1, session())], *chunks, [(31 * 10**9, trap(31))])


def places(path):
    with RecordingReader(path) as reader:
        return [offset for offset, _ in reader.chunks()]


def damage(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def json_lines(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestForPeople:
    def test_shows_sessions_then_traps_then_the_counts(self, vmibridge, run):
        done = vmibridge("inspect", str(run[0]))
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0].startswith("vm red: started 20")
        assert lines[1].startswith("  on asyncio, with python 3.")
        assert lines[2].startswith("  handlers: probe (0x0001)")
        assert lines[3].startswith("vm blue: ")
        assert lines[6].split() == HEADER
        counts = Counter(outcome.kind.value for outcome in run[1])
        told = ", ".join(f"{counts[k.value]} {k.value}" for k in OutcomeKind if counts[k.value])
        assert lines[7 + len(run[1]) :] == [f"{len(run[1])} traps: {told}"]

    def test_a_line_has_the_columns_of_a_run_behind_a_time(self, vmibridge, hand_made):
        lines = vmibridge("inspect", str(hand_made)).stdout.splitlines()
        assert lines[4].split() == [
            *("0.000000", "1", "0", "vmcall64", "probe", "fedcba98/0001/0001", "handled"),
            *([".", ".", ".", "."]), "0",
        ]  # fmt: skip
        assert lines[5].startswith("1.000000")
        assert lines[-2].split()[-3:] == ["none", "no", "reply"]
        assert lines[-1] == "31 traps: 30 handled, 1 without a reply"

    def test_text_of_a_guest_is_escaped(self, vmibridge, run):
        done = vmibridge("inspect", str(run[0]), "--full")
        assert STEER not in done.stdout
        assert r"\u202egnp.exe\x9b2J" in done.stdout
        assert all(line.isprintable() for line in done.stdout.splitlines())

    def test_so_is_whatever_a_file_says(self, vmibridge, tmp_path):
        lies = [
            (1, session(STEER)),
            (2, trap(1, vm=STEER)),
            (3, MemoryAccess(STEER, 1, 0, 0, None, False, STEER)),
            (4, reply(1, vm=STEER, handler=STEER, error="\n\x1b[2J" + "x" * 10_000)),
            (5, Note("lost", STEER)),
        ]
        path = write_file(tmp_path / "lies.mcap", lies)
        done = vmibridge("inspect", str(path), "--full")
        assert done.returncode == 0
        assert all(line.isprintable() for line in done.stdout.splitlines())
        assert max(map(len, done.stdout.splitlines())) < 1000

    def test_full_shows_registers_and_memory(self, vmibridge, run):
        text = vmibridge("inspect", str(run[0]), "--full").stdout
        assert "    registers: rcx=fedcba98 rdx=10001 r8=ffffffffffffffff" in text
        assert "    read 4 bytes at 0x2000: 00 01 02 03\n" in text
        assert "    wrote 4 bytes at 0x3000: 03 02 01 00\n" in text
        assert "    read 8 bytes at 0xfffffffffffff000: failed: not mapped\n" in text

    def test_says_what_was_left_out(self, vmibridge, run, hand_made):
        lines = vmibridge("inspect", str(hand_made), "--limit", "2").stdout.splitlines()
        assert lines[-2:] == [
            "2 traps: 2 handled",
            "stopped at --limit: what is behind was not read",
        ]


class TestJson:
    def test_is_sessions_then_traps_then_a_summary(self, vmibridge, run):
        red, blue, *traps, last = json_lines(vmibridge("inspect", str(run[0]), "--json"))
        assert [red["session"]["vm"], blue["session"]["vm"]] == ["red", "blue"]
        counts = Counter(outcome.kind.value for outcome in run[1])
        assert Counter(line["outcome"] for line in traps) == counts
        summary = last["summary"]
        assert {k: n for k, n in summary.items() if n} == {**counts, "total": len(run[1])}

    def test_full_is_what_an_export_has(self, vmibridge, run):
        listed = vmibridge("inspect", str(run[0]), "--json", "--full").stdout.splitlines()[2:-1]
        done = vmibridge("export", str(run[0]), "--to", "jsonl", "-o", "-")
        lines = done.stdout.splitlines()
        assert [line for line in lines if line.startswith('{"seq"')] == listed
        others = [list(json.loads(line))[2] for line in lines if line not in listed]
        assert sorted(others) == [*["note"] * 2, *["session"] * 2, *["step"] * 6]


class TestSelection:
    @pytest.mark.parametrize(
        ("options", "seqs"),
        [
            (["--outcome", "none"], [31]),
            (["--request", "2"], []),
            (["--request", "probe", "--limit", "2"], [1, 2]),
            (["--since", "28.5"], [30, 31]),
            (["--since", "2", "--until", "3"], [3, 4]),
            (["--until", "1970-01-01T00:00:02Z"], [1, 2]),
            (["--vcpu", "1", "--vcpu", "0", "--vm", "vm", "--until", "0"], [1]),
        ],
        ids=str,
    )
    def test_is_by_options(self, vmibridge, hand_made, options, seqs):
        lines = json_lines(vmibridge("inspect", str(hand_made), "--json", *options))
        assert [line["seq"] for line in lines[1:-1]] == seqs


class TestDamage:
    def test_a_truncated_file_is_told_with_what_to_do(self, vmibridge, hand_made):
        at = places(hand_made)[3]
        damage(hand_made, lambda data: data.__delitem__(slice(at + 50, None)))
        done = vmibridge("inspect", str(hand_made))
        assert done.returncode == 0
        clean = hand_made.with_name("made-clean.mcap")
        assert done.stdout.splitlines()[-3:] == [
            "20 traps: 20 handled",
            f"problem at byte {at}: the file ends here: it is truncated, or was not finished",
            (
                "the file is truncated; what can be read of it:"
                f" vmibridge recover {hand_made} -o {clean}"
            ),
        ]
        summary = json_lines(vmibridge("inspect", str(hand_made), "--json"))[-1]["summary"]
        assert (summary["truncated"], summary["problem_count"]) == (True, 1)
        assert summary["problems"][0]["offset"] == at

    def test_a_damaged_chunk_costs_itself_only(self, vmibridge, hand_made):
        at = places(hand_made)[2]
        damage(hand_made, lambda data: data.__setitem__(at + 70, data[at + 70] ^ 0xFF))
        *_, counts, problem, hint = vmibridge("inspect", str(hand_made)).stdout.splitlines()
        assert counts == "21 traps: 20 handled, 1 without a reply"
        assert problem.startswith(f"problem at byte {at}: a chunk is damaged")
        assert hint.startswith("the file is damaged; ")
        done = vmibridge("export", str(hand_made), "--to", "sqlite")
        assert done.returncode == 0
        told = done.stderr.splitlines()
        assert told[0] == f"21 traps to {hand_made.with_suffix('.sqlite')}"
        assert told[1].startswith(f"{hand_made}: at byte {at}")


class TestExport:
    @pytest.mark.parametrize(
        ("to", "names"),
        [
            ("jsonl", ["run.jsonl"]),
            ("foxglove", ["run.foxglove.mcap"]),
            ("perfetto", ["run.perfetto-trace"]),
            ("sqlite", ["run.sqlite"]),
            ("parquet", ["run.memory.parquet", "run.parquet"]),
        ],
    )
    def test_goes_beside_the_recording(self, vmibridge, run, tmp_path, to, names):
        (tmp_path / "run.mcap").symlink_to(run[0])
        done = vmibridge("export", "run.mcap", "--to", to)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"{len(run[1])} traps to run.")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "run.mcap"])

    def test_takes_a_selection(self, vmibridge, run, tmp_path):
        done = vmibridge(
            "export", str(run[0]), "--to", "sqlite", "-o", "x.db", "--outcome", "failed"
        )
        assert done.returncode == 0, done.stderr
        with closing(sqlite3.connect(tmp_path / "x.db")) as database:
            found = database.execute("SELECT DISTINCT outcome FROM traps").fetchall()
        assert found == [("failed",)]

    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
    )
    def test_leaves_nothing_when_it_is_ended(self, children, hand_made, tmp_path, number, status):
        code = (
            f"{PAUSE}"
            "import sys\n"
            "from vmibridge.cli import main\n"
            "from vmibridge.recording.export.jsonl import JsonLines\n"
            "JsonLines.add = lambda *_: (print('writing', flush=True), pause())\n"
            f"sys.exit(main(['export', {str(hand_made)!r}, '--to', 'jsonl']))\n"
        )
        child = children.start([sys.executable, "-c", code], cwd=tmp_path)
        assert child.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        child.send_signal(number)
        _, errors = child.communicate()
        assert (child.returncode, errors) == (status, "")
        assert list(tmp_path.iterdir()) == [hand_made]


class TestExitStatus:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["inspect", "none.mcap"], "none.mcap: No such file"),
            (["inspect", "text"], "text: is not an MCAP file"),
            (["inspect", "empty"], "empty: is empty"),
            (["inspect", "R", "--limit", "0"], "--limit"),
            (["inspect", "R", "--outcome", "fine"], "'fine' is not an outcome"),
            (["inspect", "R", "--since", "soon"], "'soon' is not a time"),
            (["export", "R"], "--to"),
            (["export", "R", "--to", "csv"], "csv"),
            (["export", "R", "--to", "sqlite", "-o", "-"], "sqlite needs a file"),
            (["export", "R", "--to", "sqlite", "-o", "text"], "text: already exists"),
            (["export", "text", "--to", "sqlite"], "text: is not an MCAP file"),
        ],
        ids=str,
    )
    @pytest.mark.no_cover
    def test_2_for_wrong_usage_in_one_line(self, vmibridge, run, tmp_path, arguments, told):
        (tmp_path / "text").write_text("no recording")
        (tmp_path / "empty").touch()
        done = vmibridge(*[str(run[0]) if each == "R" else each for each in arguments])
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmibridge: ")
        assert told in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text"]

    @pytest.mark.parametrize("arguments", PRINTING)
    def test_1_when_the_extra_is_missing(self, vmibridge, run, tmp_path, arguments):
        (tmp_path / "mcap.py").write_text("raise ModuleNotFoundError(name='mcap')\n")
        done = vmibridge(arguments[0], str(run[0]), *arguments[1:])
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            "vmibridge: a recording needs the packages lz4, mcap and zstandard, which"
        )

    @pytest.mark.no_cover
    @pytest.mark.parametrize("to", ["jsonl", "foxglove", "perfetto", "sqlite", "parquet"])
    def test_1_when_the_disk_is_full(self, hand_made, tmp_path, to):
        # A file may have one block.
        full = f"ulimit -f 1; {shlex.join(command('export', str(hand_made), '--to', to))}"
        done = run_child(["bash", "-c", full])
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmibridge: ")
        assert list(tmp_path.iterdir()) == [hand_made]

    @pytest.mark.parametrize("arguments", PRINTING)
    def test_1_when_standard_output_is_full(self, hand_made, arguments):
        with Path("/dev/full").open("w") as full:
            done = run_child(command(arguments[0], str(hand_made), *arguments[1:]), stdout=full)
        assert done.returncode == 1
        assert done.stderr == "vmibridge: standard output: No space left on device\n"

    @pytest.mark.parametrize("arguments", PRINTING)
    def test_0_when_the_reader_has_seen_enough(self, children, tmp_path, arguments):
        chunk = [(n, each(n)) for n in range(1, 5000) for each in (trap, reply)]
        path = write_file(tmp_path / "x.mcap", chunk)
        done = children.start(command(arguments[0], str(path), *arguments[1:]))
        done.stdout.readline()
        done.stdout.close()
        assert done.wait() == 0
        assert done.stderr.read() == ""
        done.stderr.close()
