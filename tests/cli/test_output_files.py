"""What a command makes takes the place of a file, and of nothing else.

Run by root with `-o /dev/stdout`, a rename would replace that device for the whole machine.
"""

import os
import stat
import sys

import pytest
from needs import needs
from recorded_session import record


@pytest.fixture
def makers(tmp_path):
    """Command lines that make a file, but for its name."""
    recording = tmp_path / "run.mcap"
    record(recording)
    return {
        "report": ["report", recording, "--force", "-o"],
        "plugin": ["qemu", "build-plugin", "-o"],
        "initramfs": ["qemu", "initramfs", os.path.realpath(sys.executable), "-o"],
    }


kinds = pytest.mark.parametrize("kind", ["report", "plugin", "initramfs"])


@kinds
def test_a_pipe_or_a_device_stays_what_it_is(vmibridge, makers, kind, tmp_path):
    needs("cc")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = vmibridge(*makers[kind], fifo)
    assert done.returncode in (1, 2)
    assert "is not a regular file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert not list(tmp_path.glob(".vmibridge-*"))


@kinds
def test_a_link_stays_and_leads_to_what_was_made(vmibridge, makers, kind, tmp_path):
    needs("cc")
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    done = vmibridge(*makers[kind], link)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert real.stat().st_size > len("old")
