"""The health of processes whose recording cannot go on, on volumes of their own."""

import os
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from asked_health import await_health
from children import run
from needs import own_namespaces
from probe_guest import ENDLESS, command

LOOPS = {"asyncio": [], "trio": ["--async-backend", "trio"]}
every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
SOCKET = "health.sock"

# In namespaces of its own: a volume that nobody else has, and root where it is a plain user.
MOUNTED = (
    "mount -t tmpfs -o size=16m tmpfs volume"
    " && mkdir volume/recordings"
    " && head -c {filled} /dev/zero > volume/filler 2>/dev/null; exec {line}"
)
NEARLY_FULL = (16 << 20) - (64 << 10)
FULL = 16 << 20
EMPTY = 0


@pytest.fixture
def started(children, tmp_path, handlers, image, monkeypatch):
    """`with started(COMMAND, FILLED, *OPTIONS) as process`; its volume is `process.volume`."""
    unshare = own_namespaces("--mount")
    monkeypatch.chdir(tmp_path)
    Path("volume").mkdir()
    guest = image(ENDLESS)

    @contextmanager
    def start(filled, *options, served=False):
        spec = ["--backend", f"unicorn:{guest}"]
        if served:
            spec = ["--listen", "unix:x.sock"]
        line = command("serve" if served else "run", *spec, "--handlers", handlers, *options)
        line += ["--record", "volume/recordings", "--health-socket", SOCKET]
        shell = MOUNTED.format(filled=filled, line=shlex.join(map(os.fspath, line)))
        with (
            Path(os.devnull).open("w") as nowhere,
            children.start([*unshare, "sh", "-c", shell], cwd=tmp_path, stdout=nowhere) as process,
        ):
            process.volume = Path(f"/proc/{process.pid}/root{tmp_path}/volume")
            yield process

    return start


@every_loop
def test_a_full_volume_that_holds_its_guests_is_live_and_not_ready_until_there_is_room(
    started, loop
):
    with started(NEARLY_FULL, "--unrecorded", "stop", *loop) as process:
        report = await_health(SOCKET, "disk-full", process=process)
        assert (report["live"], report["started"], report["ready"]) == (True, True, False)
        assert "No space left on device" in report["reasons"][0]["text"]
        (process.volume / "filler").unlink()
        await_health(SOCKET, process=process)


@every_loop
def test_a_full_volume_that_leaves_a_gap_is_told_and_traps_are_answered(started, loop):
    with started(NEARLY_FULL, "--unrecorded", "continue", *loop) as process:
        report = await_health(SOCKET, "disk-full", process=process)
        assert report["ready"]
        (process.volume / "filler").unlink()
        await_health(SOCKET, process=process)


def remount(process, how):
    """As the kernel does to a volume with errors."""
    enter = ["nsenter", f"--target={process.pid}", "--mount", "--root"]
    if os.geteuid():
        # As `own_namespaces`.
        enter += ["--user", "--preserve-credentials"]
    folder = str(Path("volume").absolute())
    # Only that: who owns it cannot be said in a namespace of users.
    run([*enter, "mount", "--options-mode=ignore", "-o", f"remount,{how}", folder], check=True)


def test_a_recording_that_was_asked_for_and_has_ended_is_told_from_a_full_volume(started):
    with started(EMPTY, "--unrecorded", "continue", "--rotate", "128K") as process:
        await_health(SOCKET, process=process)
        # What it is to go on in cannot be made.
        shutil.rmtree(process.volume / "recordings")
        (process.volume / "recordings").touch()
        report = await_health(SOCKET, "not-recording", process=process)
        assert report["ready"]
        assert "the recording ends here" in report["reasons"][0]["text"]


def test_a_server_whose_vms_cannot_be_recorded_would_answer_none(started):
    """Known before a VM comes."""
    with started(EMPTY, served=True) as serve:
        await_health(SOCKET, process=serve)
        remount(serve, "ro")
        report = await_health(SOCKET, "not-recording", process=serve)
        assert (report["live"], report["ready"]) == (True, False)
        assert report["reasons"][0]["text"].endswith("recordings: Read-only file system")
        remount(serve, "rw")
        await_health(SOCKET, process=serve)


@every_loop
@pytest.mark.parametrize("unrecorded", ["stop", "continue"])
def test_a_server_without_room_for_its_first_vm_says_so_before_it_comes(
    started, children, image, loop, unrecorded
):
    with started(FULL, "--unrecorded", unrecorded, *loop, served=True) as serve:
        report = await_health(SOCKET, "disk-full", process=serve)
        is_ready = unrecorded == "continue"
        assert (report["live"], report["started"], report["ready"]) == (True, True, is_ready)
        assert report["reasons"][0]["text"].endswith("recordings: No space left on device")
        # One reason, and not another one of each VM that is held.
        line = command("agent", "--backend", f"web=unicorn:{image(ENDLESS)}")
        with children.start([*line, "--connect", "unix:x.sock"], stdout=subprocess.DEVNULL):
            report = await_health(SOCKET, "disk-full", process=serve)
            assert report["ready"] == is_ready
            (serve.volume / "filler").unlink()
            await_health(SOCKET, process=serve)


@pytest.mark.parametrize(
    ("unrecorded", "status"), [("stop", 1), ("continue", 0)], ids=["stop", "continue"]
)
def test_a_stop_of_a_server_that_loses_traps_is_no_good_end(
    started, children, image, unrecorded, status
):
    options = ["--unrecorded", unrecorded, "--exit-zero"]
    with started(NEARLY_FULL - (64 << 10), *options, served=True) as serve:
        await_health(SOCKET, process=serve)
        line = command("agent", "--backend", f"web=unicorn:{image(ENDLESS)}")
        with children.start([*line, "--connect", "unix:x.sock"], stdout=subprocess.DEVNULL):
            for told in serve.stderr:
                if "mcap: No space left" in told:  # for traps, as there was room before
                    break
            serve.terminate()
            _, told = serve.communicate()
    assert serve.returncode == status
    assert ("not recorded at the stop" in told) == (unrecorded == "stop")


def test_a_server_whose_folder_takes_nothing_does_not_begin(children, tmp_path, handlers):
    (tmp_path / "taken").touch()
    line = command("serve", "--listen", "unix:x.sock", "--handlers", handlers, "--record", "taken")
    with children.start(line, cwd=tmp_path) as serve:
        _, told = serve.communicate()
    assert (serve.returncode, told) == (1, "vmibridge: taken: File exists\n")
