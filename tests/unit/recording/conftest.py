"""What the tests of recordings have in common."""

import errno
import os

import pytest

from vmibridge.recording.file import writer as writer_module


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


class SmallDisk:
    """Stands for `os` in the writer: after `room` bytes the disk is full, or broken."""

    def __init__(self, room=1 << 30):
        self.room = room
        self.code = errno.ENOSPC

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        if not self.room:
            raise OSError(self.code, os.strerror(self.code))
        written = os.write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    disk = SmallDisk()
    monkeypatch.setattr(writer_module, "os", disk)
    return disk
