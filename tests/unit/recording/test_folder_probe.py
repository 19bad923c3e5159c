"""A folder of recordings that takes none, found out before there is a recording to be made."""

import errno
import os
import threading

import anyio
import pytest
from waiting import until

from vmibridge.engine.taps import Hindrance
from vmibridge.errors import RecordingError
from vmibridge.recording import folder_probe
from vmibridge.recording.folder_probe import FolderProbe

pytestmark = pytest.mark.anyio


class Disk:
    """Stands for `tempfile.TemporaryFile`: a volume with `room` bytes."""

    def __init__(self):
        self.room = 1 << 20
        self.error = errno.ENOSPC
        self.probes = 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self, **_):
        self.probes += 1
        self.left = self.room
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data):
        assert self.goes_on.wait(60)
        taken = min(len(data), self.left, 4096)
        if not taken:
            raise OSError(self.error, os.strerror(self.error))
        self.left -= taken
        return taken


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(folder_probe.tempfile, "TemporaryFile", disk)
    for name in ("_EVERY", "_AGAIN"):
        monkeypatch.setattr(folder_probe, name, 0.005)
    return disk


def logged(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name == folder_probe.log.name
    ]


async def test_a_folder_with_room_is_made_and_stays_empty(tmp_path):
    folder = tmp_path / "a/b"
    assert FolderProbe(folder, holds_guests=True).hindrance is None
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize("room", [0, 8192], ids=["none", "for a part"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("holds", "are"),
    [(True, "are held until there is room"), (False, "run unrecorded until there is room")],
    ids=["stop", "continue"],
)
async def test_a_volume_that_is_full_is_known_at_the_start_and_until_there_is_room(
    tmp_path, disk, caplog, room, error, holds, are
):
    disk.room, disk.error = room, error
    probe = FolderProbe(tmp_path, holds_guests=holds)
    why = f"{tmp_path}: {os.strerror(error)}"
    assert probe.hindrance == Hindrance("disk full", why, holds)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(probe.watch)
        await until(lambda: disk.probes > 3)
        assert probe.hindrance == Hindrance("disk full", why, holds)
        disk.room = 1 << 20
        await until(lambda: probe.hindrance is None)
        tasks.cancel_scope.cancel()
    # Each once, however many probes there were.
    assert logged(caplog) == [f"{why}: VMs that come {are}", f"{tmp_path}: takes recordings again"]


async def test_what_begins_later_is_found(tmp_path, disk, caplog):
    probe = FolderProbe(tmp_path, holds_guests=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(probe.watch)
        await until(lambda: disk.probes > 3)
        assert probe.hindrance is None
        disk.room, disk.error = 0, errno.EROFS
        await until(lambda: probe.hindrance)
        # Nothing is recorded of a VM that comes: so it is not served, and no choice lets it be.
        why = f"{tmp_path}: Read-only file system"
        assert probe.hindrance == Hindrance("not recording", why, holds_guests=True)
        tasks.cancel_scope.cancel()
    assert logged(caplog) == [f"{why}: VMs that come cannot be recorded"]


async def test_a_disk_that_hangs_is_told_and_holds_up_nothing(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(folder_probe, "_PATIENCE", 0.01)
    probe = FolderProbe(tmp_path, holds_guests=True)
    disk.goes_on.clear()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(probe.watch)
        await until(lambda: probe.hindrance)
        assert probe.hindrance.kind == "not recording"
        assert probe.hindrance.why == f"{tmp_path}: takes nothing for 0.01 s"
        before = disk.probes
        await anyio.sleep(0.05)
        assert disk.probes == before  # one at a time
        disk.goes_on.set()
        await until(lambda: probe.hindrance is None)
        disk.goes_on.clear()
        await until(lambda: probe.hindrance)
        tasks.cancel_scope.cancel()  # with a probe that hangs
    disk.goes_on.set()


async def test_a_folder_that_takes_nothing_is_an_error_at_the_start(tmp_path, disk):
    disk.room, disk.error = 0, errno.EACCES
    with pytest.raises(RecordingError, match=f"^{tmp_path}: Permission denied$"):
        FolderProbe(tmp_path, holds_guests=True)
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match=r"file: File exists$"):
        FolderProbe(tmp_path / "file", holds_guests=True)


async def test_a_folder_that_was_removed_is_made_again(tmp_path, disk):
    folder = tmp_path / "recordings"
    probe = FolderProbe(folder, holds_guests=True)
    folder.rmdir()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(probe.watch)
        await until(folder.exists)
        tasks.cancel_scope.cancel()
