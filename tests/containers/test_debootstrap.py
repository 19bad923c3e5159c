"""How a debootstrap ends that takes too long, with a fake of it: nothing of it is left behind."""

import os
import threading
from pathlib import Path

import debian
import pytest

ROOT = Path(__file__).parents[2]

FAKE = """#!/bin/sh
# A fake: it never ends, and neither does the program that it has started.
sleep 1000 &
echo $! > "$FAKE_PID.new" && mv "$FAKE_PID.new" "$FAKE_PID"
[ -z "$FAKE_MOUNT" ] || { mkdir -p "$FAKE_MOUNT" && mount -t tmpfs none "$FAKE_MOUNT"; }
mkfifo "$FAKE_PID.ready" && echo > "$FAKE_PID.ready"
wait
"""


@pytest.fixture
def fake_debootstrap(tmp_path, monkeypatch):
    """The file that has the number of the program that the fake has started."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/debootstrap"
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    monkeypatch.setenv("FAKE_MOUNT", "")
    monkeypatch.setattr(debian, "archive", lambda: "http://archive.test/debian")
    return tmp_path / "pid"


@pytest.fixture
def time_runs_out(fake_debootstrap, monkeypatch):
    """The limit is over when the fake has done all that it does."""

    def wait(process, seconds):
        ready = fake_debootstrap.with_name("pid.ready")
        while not ready.exists():
            threading.Event().wait(0.01)
        ready.read_text()
        raise debian.subprocess.TimeoutExpired("debootstrap", seconds)

    real = debian.subprocess.Popen.wait
    first = []

    def once(process, timeout=None):
        if timeout == debian.DEBOOTSTRAP_SECONDS and not first:
            first.append(process)
            wait(process, timeout)
        return real(process, timeout)

    monkeypatch.setattr(debian.subprocess.Popen, "wait", once)


def is_gone(number):
    """It has ended, whether or not somebody has waited for it."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


@pytest.mark.usefixtures("time_runs_out")
def test_what_it_started_ends_with_it(fake_debootstrap, tmp_path):
    with pytest.raises(debian.DebianError, match="not done after"):
        debian.debootstrap("trixie", tmp_path / "root", ["ca-certificates"])
    number = int(fake_debootstrap.read_text())
    while not is_gone(number):
        threading.Event().wait(0.01)


@pytest.mark.usefixtures("fake_debootstrap", "time_runs_out")
def test_what_it_mounted_is_unmounted(tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("mounts can be made only as root")
    point = tmp_path / "root/proc"
    monkeypatch.setenv("FAKE_MOUNT", str(point))
    with pytest.raises(debian.DebianError, match="not done after"):
        debian.debootstrap("trixie", tmp_path / "root", ["ca-certificates"])
    assert str(point) not in Path("/proc/self/mounts").read_text()
