"""The files of one recording, one after another, and room for them. Blocking, for a thread.

A file is finished before the next one is made: so a crash in between leaves whole files. What the
volume has no room for fails by itself and changes nothing: the same call, later, goes on from
there, with an index that is missing or with the next file. The names follow the first:

| first | then |
|---|---|
| `web-7.mcap`, numbered in a folder | `web-8.mcap`, or the next number that is free |
| `trace.mcap`, named | `trace-2.mcap`, or the next number that is free |
"""

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from vmibridge.errors import RecordingError
from vmibridge.recording.file.chunk_builder import PackedChunk
from vmibridge.recording.file.folder import Bounds, make_room
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.text import counted

__all__ = ["RecordingParts"]

_PATIENCE = 1.0
"""Seconds for another thread to write its chunk."""


class RecordingParts:
    """Its calls raise `OSError`, and `RecordingError` for a file that cannot be made; not for
    several threads at a time."""

    def __init__(
        self,
        path: Path,
        library: str,
        *,
        stem: str = "run",
        overwrite: bool = False,
        max_size: int | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """`max_size` bytes are what a file may come to have, `bounds` those of the folder."""
        self.news: list[tuple[int, str]] = []
        """What is to be logged, with its level: whoever calls takes it away."""
        self.part: int = 0
        """The number of the file that is written; 0: there is none yet."""
        self._first = path
        self._library = library
        self._stem = stem
        self._suffix = ".mcap"
        self._overwrite = overwrite
        self._max_size = max_size or 0
        self._bounds = bounds
        self._writer: RecordingWriter | None = None
        self._is_finished = False
        self._number = 1
        self._lock = Lock()
        self._last: PackedChunk | None = None
        """The last one that is in a file."""

    @property
    def path(self) -> Path:
        """The file that is written now, or the place where the first one is to be made."""
        return self._first if self._writer is None else self._writer.path

    @property
    def traps(self) -> int:
        """How many that file has."""
        return 0 if self._writer is None else self._writer.traps

    def open(self) -> None:
        """Make the first file. Raises `RecordingError` as `RecordingWriter` does."""
        numbered = self._first.is_dir()
        self._writer = RecordingWriter(
            self._first, self._library, stem=self._stem, overwrite=self._overwrite
        )
        self.part = 1
        if numbered:
            self._number = _number(self.path)
        else:
            self._stem, self._suffix = self._first.stem, self._first.suffix
        self._make_room()

    def add(self, part: int, chunk: PackedChunk) -> int:
        """Append a chunk to the file of that part; returns the bytes it takes there."""
        with self._lock:
            size = self._add(part, chunk)
            self._last = chunk
        return size

    def finish_with(self, chunks: Sequence[tuple[int, PackedChunk]]) -> None:
        """Append those that are not in it yet, of their parts, and finish: beside a thread that may
        be in a call of its own. Raises `TimeoutError` if that takes longer than a second."""
        if not self._lock.acquire(timeout=_PATIENCE):
            raise TimeoutError(errno.ETIMEDOUT, "the disk takes nothing")
        try:
            for part, chunk in chunks:
                if chunk is not self._last:
                    self._add(part, chunk)
            self.finish()
        finally:
            self._lock.release()

    def _add(self, part: int, chunk: PackedChunk) -> int:
        if self._writer is None:
            self.open()
        if part != self.part:
            return self._add_to_next(part, chunk)
        assert self._writer is not None
        before = self._writer.size
        self._writer.add(chunk)
        return self._writer.size - before

    def finish(self) -> None:
        """Write the index of the last file and close it. On `OSError` it stays open."""
        if self._writer is not None and not self._is_finished:
            self._writer.finish()
            self._is_finished = True

    def close(self) -> None:
        """Close it as it is."""
        if self._writer is not None:
            self._writer.close()

    def _add_to_next(self, part: int, chunk: PackedChunk) -> int:
        self.finish()
        before, traps = self.path, self.traps
        writer = RecordingWriter(
            before.parent,
            self._library,
            stem=self._stem,
            suffix=self._suffix,
            after=self._number,
        )
        try:
            # Before the first chunk: the room may be what the oldest files have.
            self._make_room()
            writer.add(chunk)
        except OSError as error:
            # One of nothing but a header would be in the way.
            writer.close()
            writer.path.unlink(missing_ok=True)
            self.news = [each for each in self.news if each[0] < logging.WARNING]
            raise RecordingError(f"{writer.path}: {error.strerror}") from error
        self._writer, self._is_finished, self.part = writer, False, part
        self._number = _number(writer.path)
        count = counted(traps, "trap was", "traps were")
        told = f"{before}: {count} recorded; it goes on in {writer.path}"
        self.news.insert(0, (logging.INFO, told))
        return writer.size

    def _make_room(self) -> None:
        if self._bounds is None:
            return
        folder, bounds = self.path.parent, self._bounds
        try:
            removed, size, files = make_room(folder, bounds, self._max_size)
        except OSError as error:
            self.news.append((logging.WARNING, f"{folder}: no room is made: {error.strerror}"))
            return
        for path in removed:
            self.news.append((logging.INFO, f"{path}: removed, the oldest, so that {bounds}"))
        if bounds.are_exceeded(size, files):
            come = f"may come to {size} bytes" if bounds.size else f"are {files}"
            told = f"{folder}: recordings {come}: none more can be removed"
            self.news.append((logging.WARNING, told))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
