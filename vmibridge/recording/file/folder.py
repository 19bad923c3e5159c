"""A folder of recordings: their numbered names, and room for the next one.

| a file is | counted | removed for room |
|---|---|---|
| not called STEM-NUMBER.mcap, or not made by a recorder | no | never |
| locked: being written, by whichever process | yes, as `size` bytes at least | never |
| closed, or its process is gone | yes | the oldest of the stem that has the most |

A recorder locks its file before it writes the first byte, so a file whose header can be read and
that is not locked is closed. Of several VMs, each with a stem of its own, the one that fills the
folder loses its own recordings first. Blocking, for a thread.
"""

import contextlib
import fcntl
import itertools
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["Bounds", "Room", "is_locked", "lock", "make_room", "open_numbered", "unlock"]

_NUMBERED = re.compile(r"(.+)-([0-9]{1,9})\.mcap", re.DOTALL)
_MADE_BY_A_RECORDER = re.compile(
    # Magic, opcode, length, profile and library: MCAP specification, "Header". `recover` makes
    # files of another library: who keeps one meant to.
    rb"\x89MCAP0\r\n\x01.{8}\x09\0\0\0vmibridge.{4}vmibridge [0-9]",
    re.DOTALL,
)
_HEADER = 64


class Bounds(NamedTuple):
    """The most that all recordings of a folder come to; `None`: any."""

    size: int | None
    """Bytes."""
    files: int | None
    """How many."""

    def __str__(self) -> str:
        """As in "so that ...": what is kept."""
        size = None if self.size is None else f"recordings have {self.size} bytes at most"
        files = None if self.files is None else f"{self.files} are kept"
        return " and ".join(each for each in (size, files) if each)

    def are_exceeded(self, size: int, files: int) -> bool:
        """Whether so many bytes, or files, are too many."""
        return (self.size is not None and size > self.size) or (
            self.files is not None and files > self.files
        )


class Room(NamedTuple):
    """What making room came to."""

    removed: list[Path]
    size: int
    """Bytes that all recordings have now, or may come to have."""
    files: int
    """How many there are."""


class _Recording(NamedTuple):
    path: Path
    stem: str
    size: int
    written: int
    """When it was written last, in nanoseconds."""
    number: int


def lock(fd: int) -> None:
    """Mark a file as being written. Where there are no locks, no process removes a file, either."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(fd: int) -> None:
    """Take that back: also for processes that were forked meanwhile, and have the file open."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def is_locked(fd: int) -> bool:
    """Whether somebody writes the file, or it cannot be known."""
    try:
        # Shared: two that look at the same time do not take each other for a writer.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    unlock(fd)
    return False


def open_numbered(
    folder: Path, stem: str, suffix: str, after: int | None = None
) -> tuple[Path, int]:
    """A new file for this process alone, whoever else makes one there.

    Its number is the first free one behind `after`, or behind the highest that is there: so later
    ones have higher numbers, also where others were removed. Raises `OSError`.
    """
    if after is None:
        pattern = re.compile(rf"{re.escape(stem)}-([0-9]{{1,9}}){re.escape(suffix)}", re.DOTALL)
        found = [pattern.fullmatch(each.name) for each in folder.iterdir()]
        after = max((int(match[1]) for match in found if match), default=0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL
    for number in itertools.count(after + 1):
        path = folder / f"{stem}-{number}{suffix}"
        try:
            return path, os.open(path, flags, 0o600)
        except FileExistsError:
            continue
    raise AssertionError("numbers do not end")


def make_room(folder: Path, bounds: Bounds, size: int) -> Room:
    """Remove closed recordings until all that are there are within `bounds`.

    One that is being written may grow to `size` bytes, and is counted so. Raises `OSError`.
    """
    closed: dict[str, list[_Recording]] = {}
    sum_of_all = files = 0
    for each in os.scandir(folder):
        match = _NUMBERED.fullmatch(each.name)
        if match is None:
            continue
        try:
            found = _look_at(Path(each.path), match[1], int(match[2]))
        except OSError:
            # It has gone meanwhile, or may not be read: then it is not ours.
            continue
        if found is None:
            continue
        recording, is_written = found
        files += 1
        sum_of_all += max(recording.size, size) if is_written else recording.size
        if not is_written:
            closed.setdefault(recording.stem, []).append(recording)
    for recordings in closed.values():
        recordings.sort(key=lambda each: (each.written, each.number), reverse=True)
    sizes = {stem: sum(each.size for each in recordings) for stem, recordings in closed.items()}
    removed: list[Path] = []
    while closed and bounds.are_exceeded(sum_of_all, files):
        if bounds.size is not None and sum_of_all > bounds.size:
            stem = max(sizes, key=sizes.__getitem__)
        else:
            stem = max(closed, key=lambda each: len(closed[each]))
        oldest = closed[stem].pop()
        sizes[stem] -= oldest.size
        sum_of_all -= oldest.size
        files -= 1
        if not closed[stem]:
            del closed[stem], sizes[stem]
        try:
            oldest.path.unlink()
        except FileNotFoundError:
            # Another process makes room, too.
            continue
        removed.append(oldest.path)
    return Room(removed, sum_of_all, files)


def _look_at(path: Path, stem: str, number: int) -> tuple[_Recording, bool] | None:
    """A recording, and whether it is being written; `None` for another file. Raises `OSError`."""
    # Not through a link, and without waiting for the other end of a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or not _MADE_BY_A_RECORDER.match(os.read(fd, _HEADER)):
            return None
        return _Recording(path, stem, about.st_size, about.st_mtime_ns, number), is_locked(fd)
    finally:
        os.close(fd)
