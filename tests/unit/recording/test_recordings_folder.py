"""Room in a folder of recordings: what is removed, and what never is."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmibridge.recording.file import folder as folder_module
from vmibridge.recording.file.folder import Bounds, is_locked, make_room
from vmibridge.recording.file.recover import recover
from vmibridge.recording.file.writer import RecordingWriter

LIBRARY = "vmibridge 1.0"


def made(path, seconds=0, *, library=LIBRARY, size=0):
    """A closed recording, last written so many seconds after the first one."""
    writer = RecordingWriter(path, library)
    writer.finish()
    if size:
        os.truncate(path, size)
    os.utime(path, (1_000_000 + seconds,) * 2)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_oldest_goes_first_whatever_its_number(tmp_path):
    for number, seconds in ((1, 3), (2, 1), (3, 2)):
        made(tmp_path / f"run-{number}.mcap", seconds, size=100_000)
    assert make_room(tmp_path, Bounds(250_000, None), 0).removed == [tmp_path / "run-2.mcap"]
    assert make_room(tmp_path, Bounds(250_000, None), 0).removed == []
    assert make_room(tmp_path, Bounds(0, None), 0).removed == [
        tmp_path / "run-3.mcap",
        tmp_path / "run-1.mcap",
    ]


def test_the_vm_that_has_most_loses_its_own(tmp_path):
    made(tmp_path / "quiet-1.mcap", 0, size=50_000)
    for number in range(1, 9):
        made(tmp_path / f"noisy-{number}.mcap", number, size=50_000)
    make_room(tmp_path, Bounds(200_000, None), 0)
    assert names(tmp_path) == ["noisy-6.mcap", "noisy-7.mcap", "noisy-8.mcap", "quiet-1.mcap"]


def test_so_many_files_are_kept(tmp_path):
    for number in range(1, 6):
        made(tmp_path / f"noisy-{number}.mcap", number)
    made(tmp_path / "quiet-1.mcap", 0)
    writer = RecordingWriter(tmp_path, LIBRARY, stem="now")
    assert make_room(tmp_path, Bounds(None, 4), 0).files == 4
    assert names(tmp_path) == ["noisy-4.mcap", "noisy-5.mcap", "now-1.mcap", "quiet-1.mcap"]
    assert make_room(tmp_path, Bounds(1 << 20, 3), 0).files == 3
    writer.close()


def test_one_that_is_written_is_not_removed_and_counts_as_what_it_may_become(tmp_path):
    writer = RecordingWriter(tmp_path, LIBRARY)
    for seconds in range(4):
        made(tmp_path / f"old-{seconds}.mcap", seconds, size=100_000)
    removed, size, files = make_room(tmp_path, Bounds(500_000, None), 300_000)
    assert (size, files) == (500_000, 3)
    assert [path.name for path in removed] == ["old-0.mcap", "old-1.mcap"]
    assert make_room(tmp_path, Bounds(0, None), 300_000).size == 300_000
    assert names(tmp_path) == [writer.path.name]
    writer.close()
    assert make_room(tmp_path, Bounds(0, None), 300_000).removed == [writer.path]


def test_one_of_a_process_that_was_killed_is_closed(tmp_path):
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from vmibridge.recording.file.writer import RecordingWriter\n"
        "writer = RecordingWriter(Path(sys.argv[1]), 'vmibridge 1.0')\n"
        "print(writer.path, flush=True); sys.stdin.readline()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            path = Path(process.stdout.readline().strip())
            assert make_room(tmp_path, Bounds(0, None), 0).removed == [], (
                "another process writes it"
            )
        finally:
            process.kill()
        process.wait()
    assert make_room(tmp_path, Bounds(0, None), 0).removed == [path]


def test_what_a_recorder_has_not_made_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    made(outside / "run-1.mcap")
    folder = tmp_path / "folder"
    folder.mkdir()
    made(folder / "dear.mcap")
    made(folder / "run-1.mcap.bak")
    made(folder / "run-0000000001.mcap")
    made(folder / "other-1.mcap", library="another tool")
    (folder / "text-1.mcap").write_text("something dear")
    (folder / "empty-1.mcap").touch()
    recover(outside / "run-1.mcap", folder / "kept-1.mcap")
    (folder / "link-1.mcap").symlink_to(outside / "run-1.mcap")
    os.mkfifo(folder / "pipe-1.mcap")
    (folder / "folder-1.mcap").mkdir()
    before = names(folder)
    assert make_room(folder, Bounds(0, None), 1 << 40).removed == []
    assert names(folder) == before
    assert names(outside) == ["run-1.mcap"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    made(tmp_path / "run-1.mcap")

    def unsupported(fd, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_module.fcntl, "flock", unsupported)
    assert make_room(tmp_path, Bounds(0, None), 0).removed == []
    RecordingWriter(tmp_path, LIBRARY).finish()
    assert names(tmp_path) == ["run-1.mcap", "run-2.mcap"]


def test_two_that_look_at_once_do_not_take_each_other_for_a_writer(tmp_path):
    path = made(tmp_path / "run-1.mcap")
    with path.open("rb") as one, path.open("rb") as other:
        fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_locked(other.fileno())


def test_a_process_that_was_forked_meanwhile_does_not_keep_it(tmp_path):
    writer = RecordingWriter(tmp_path, LIBRARY)
    copy = os.dup(writer._fd)
    try:
        writer.finish()
        assert make_room(tmp_path, Bounds(0, None), 0).removed == [writer.path]
    finally:
        os.close(copy)


def test_a_folder_that_is_gone_is_told(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        make_room(tmp_path / "gone", Bounds(0, None), 0)
