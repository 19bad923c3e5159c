"""Recordings and files of outcomes that do not grow for ever: options, signals, and `kill -9`."""

import json
import os
import random
import signal
import subprocess

import pytest
from probe_guest import ENDLESS, calls, command, counted

from vmibridge.cli.outcome_file import OutcomeFile
from vmibridge.cli.output import JsonWriter
from vmibridge.errors import BackendError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.traps import recorded_traps

pytestmark = pytest.mark.no_cover

SIZE = 128 << 10
LOOPS = [["--async-backend", "trio"], ["--uvloop"], []]


def run(image, handlers, *options, code=None):
    return [
        "run",
        "--backend",
        f"unicorn:{image(code or calls(1))}",
        "--handlers",
        handlers,
        *options,
    ]


def parts_of(folder):
    return sorted(folder.glob("*.mcap"), key=lambda each: (len(each.name), each.name))


def traps_of(path):
    """The numbers of the traps in a file, and whether it is whole."""
    with RecordingReader(path) as reader:
        seqs = [trap.event.seq for trap in recorded_traps(reader.messages())]
        assert reader.complete or not reader.problem_count or "truncated" in str(reader.problems[0])
        return seqs, reader.complete


# --- recordings ---------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_each_part_is_listed_replayed_and_reported_by_itself(
    vmibridge, image, handlers, tmp_path, loop
):
    code = counted(2500)
    options = ["--record", "run.mcap", "--rotate", "128K", *loop]
    done = vmibridge(*run(image, handlers, *options, code=code))
    assert done.returncode == 0, done.stderr
    parts = parts_of(tmp_path)
    assert [part.name for part in parts][:2] == ["run.mcap", "run-2.mcap"]
    assert all(part.stat().st_size <= SIZE for part in parts)
    assert [seq for part in parts for seq in traps_of(part)[0]] == list(range(1, 2501))
    assert "traps were recorded; it goes on in run-2.mcap" in done.stderr
    second = parts[1].name
    listed = vmibridge("inspect", second)
    assert ", part 2 of a recording" in listed.stdout
    assert "truncated" not in listed.stdout
    again = vmibridge("replay", second, "--handlers", handlers, "--strict")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ", 0 different" in again.stdout
    assert "this is part 2 of a recording: handlers lack the state of those before" in again.stderr
    assert vmibridge("report", second, "-o", "page.html").returncode == 0


def test_a_run_that_is_killed_has_lost_what_was_not_written_and_no_file(
    children, image, handlers, tmp_path
):
    arguments = run(image, handlers, "--record", ".", "--rotate", "128K", code=ENDLESS)
    with children.start(command(*arguments), cwd=tmp_path) as process:
        # It is killed at another place each time: at a split, too.
        for _ in range(random.Random().randrange(1000, 4000)):
            process.stdout.readline()
        process.kill()
    *whole, last = [traps_of(part) for part in parts_of(tmp_path)]
    assert whole
    assert all(complete for _, complete in whole), "only what was written then may be cut"
    seqs = [seq for part, _ in [*whole, last] for seq in part]
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.no_cover
def test_the_total_of_a_folder_holds_over_several_runs(vmibridge, image, handlers, tmp_path):
    code = counted(3000)
    (tmp_path / "dear.mcap").write_bytes(b"something dear")
    for _ in range(3):
        done = vmibridge(*run(image, handlers, "--record", ".", "--keep", "512KiB", code=code))
        assert done.returncode == 0, done.stderr
    parts = [part for part in parts_of(tmp_path) if part.name != "dear.mcap"]
    assert sum(part.stat().st_size for part in parts) <= 512 << 10
    assert (
        "run-1.mcap: removed, the oldest" in done.stderr or not (tmp_path / "run-1.mcap").exists()
    )
    assert (tmp_path / "dear.mcap").read_bytes() == b"something dear"


@pytest.mark.no_cover
def test_a_folder_of_a_server_is_bounded_for_all_its_vms(
    children, vmibridge, image, tmp_path, handlers
):
    bounds = ["--record", "runs", "--rotate", "128K", "--keep", "384K"]
    server = ["serve", "--listen", "unix:x.sock", "--handlers", handlers, *bounds]
    guest = image(counted(2500))
    with children.start(command(*server), cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while "listening" not in process.stderr.readline():
            pass
        for name in ("a", "b", "c"):
            agent = ["agent", "--backend", f"{name}=unicorn:{guest}", "--connect", "unix:x.sock"]
            assert vmibridge(*agent).returncode == 0
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
    parts = parts_of(tmp_path / "runs")
    assert sum(part.stat().st_size for part in parts) <= 384 << 10
    assert ": removed, the oldest" in told
    newest = max(parts, key=lambda part: part.stat().st_mtime_ns)
    assert newest.name.startswith("c-")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rotate", "1M"], "--rotate is about a recording: give --record FILE, too"),
        (["--keep", "1M"], "--keep is about a recording: give --record FILE, too"),
        (["--record", "r", "--rotate", "1GB"], "--rotate 1GB: is not a size or a time; give one"),
        (["--record", "r", "--rotate", "-5"], "--rotate -5: is not a size or a time"),
        (["--record", "r", "--rotate", "10"], "--rotate 10: is not a size or a time"),
        (["--record", "r", "--rotate", "9" * 5000], ": is not a size or a time; give one of each"),
        (["--record", "r", "--rotate", "1h", "--rotate", "2h"], "--rotate 2h: is not a size or a"),
        (["--record", "r", "--rotate", "5K"], "--rotate is at least 131072 bytes, got 5120"),
        (["--record", "r", "--rotate", "0s"], "--rotate is at least 1 second, got 0"),
        (["--record", ".", "--keep", "5K"], "--keep is at least 524288 bytes, got 5120"),
        (["--record", ".", "--keep", "0"], "--keep is at least 1, got 0"),
        (["--record", ".", "--keep", "1h"], "--keep 1h: is not a number of files or a size; give"),
        (["--record", "r", "--keep", "4G"], "--keep is for recordings in a folder, and r is none"),
        (["--record", "r", "--keep", "4"], "--keep is for recordings in a folder, and r is none"),
        (
            ["--record", ".", "--rotate", "1M", "--keep", "1M"],
            "--keep is at least twice --rotate, got 1048576",
        ),
    ],
)
def test_what_is_wrong_is_one_line(vmibridge, image, handlers, tmp_path, options, told):
    done = vmibridge(*run(image, handlers, *options))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not parts_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--record", "r", "--rotate", "5K"], 2, "--rotate is at least 131072"),
        (["--record", "r", "--redact", "nonsense"], 2, "'nonsense' is not a redaction"),
        (["--record", "handlers/x"], 1, "handlers/x: Not a directory"),
    ],
)
def test_a_server_says_it_before_anybody_comes(
    vmibridge, tmp_path, handlers, options, status, told
):
    (tmp_path / "handlers").touch()
    done = vmibridge("serve", "--listen", "unix:x.sock", "--handlers", handlers, *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


# --- outcomes -----------------------------------------------------------------------------


def lines(first, last):
    return [json.dumps({"line": number}).encode() + b"\n" for number in range(first, last)]


@pytest.fixture
def bounded(tmp_path):
    """A file of outcomes of 100 bytes, and its writer."""
    file = OutcomeFile(tmp_path / "out.json", 100)
    yield file, JsonWriter(file.fd, file)
    file.close()


@pytest.mark.anyio
class TestAFileOfOutcomes:
    async def write(self, writer, first, last):
        for line in lines(first, last):
            await writer.write(line)

    async def test_takes_turns_with_the_one_before(self, bounded, tmp_path):
        _, writer = bounded
        await self.write(writer, 10, 90)
        now, before = (tmp_path / name for name in ("out.json", "out.json.1"))
        assert sorted(tmp_path.iterdir()) == [now, before]
        assert all(path.stat().st_size <= 100 for path in (now, before))
        kept = before.read_bytes() + now.read_bytes()
        assert kept == b"".join(lines(90 - kept.count(b"\n"), 90))
        assert kept.count(b"\n") > 100 // 13
        assert writer.dropped == 0

    async def test_takes_a_line_that_is_larger(self, bounded, tmp_path):
        _, writer = bounded
        await writer.write(b"{}\n")
        await writer.write(b"x" * 500 + b"\n")
        await writer.write(b"{}\n")
        assert (tmp_path / "out.json.1").stat().st_size == 501
        assert (tmp_path / "out.json").read_bytes() == b"{}\n"

    async def test_drops_lines_while_it_cannot_make_a_file_and_heals(
        self, bounded, tmp_path, caplog
    ):
        _, writer = bounded
        (tmp_path / "out.json.1").mkdir()
        await self.write(writer, 10, 30)
        assert (tmp_path / "out.json").stat().st_size <= 100
        assert writer.dropped > 5
        assert "is not a regular file" in caplog.messages[0]
        (tmp_path / "out.json.1").rmdir()
        await self.write(writer, 30, 31)
        assert (tmp_path / "out.json").read_bytes() == lines(30, 31)[0]

    async def test_makes_another_when_the_file_was_moved(self, bounded, tmp_path):
        _, writer = bounded
        await self.write(writer, 10, 17)
        (tmp_path / "out.json").rename(tmp_path / "moved")
        await self.write(writer, 17, 18)
        assert (tmp_path / "out.json").read_bytes() == lines(17, 18)[0]
        assert (tmp_path / "moved").read_bytes() == b"".join(lines(10, 17))

    async def test_behind_a_link_leaves_the_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real/out")
        file = OutcomeFile(tmp_path / "link", 100)
        await self.write(JsonWriter(file.fd, file), 10, 40)
        file.close()
        assert (tmp_path / "link").is_symlink()
        assert {path.name for path in (tmp_path / "real").iterdir()} == {"out", "out.1"}

    async def test_is_no_device_and_no_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in ("/dev/null", "pipe"):
            with pytest.raises(BackendError, match="cannot be written: is not a regular file"):
                OutcomeFile(tmp_path / path, 100)


def test_its_size_is_that_of_a_file(vmibridge, handlers):
    words = ["qemu", "run", "--handlers", handlers, "--outcomes-max-size", "1MiB"]
    done = vmibridge(*words)
    assert done.returncode == 2
    assert "--outcomes-max-size is about a file: give --outcomes FILE, too" in done.stderr
    done = vmibridge(*words[:-1], "much", "--outcomes", "x")
    assert done.returncode == 2
    assert "--outcomes-max-size much: is not a size" in done.stderr
