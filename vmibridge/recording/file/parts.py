"""The files of one recording, one after another, and room for them. Blocking, for a thread.

A file is finished before the next one is made: so a crash in between leaves whole files, and a
disk that is full at that moment leaves one without its index. The names follow the first:

| first | then |
|---|---|
| `web-7.mcap`, numbered in a folder | `web-8.mcap`, or the next number that is free |
| `trace.mcap`, named | `trace-2.mcap`, or the next number that is free |
"""

import logging
from pathlib import Path

from vmibridge.errors import RecordingError
from vmibridge.recording.file.chunk_builder import PackedChunk
from vmibridge.recording.file.folder import make_room
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.text import counted

__all__ = ["RecordingParts"]


class RecordingParts:
    """Its calls raise `OSError`; not for several threads at a time."""

    def __init__(
        self,
        path: Path,
        library: str,
        *,
        stem: str = "run",
        overwrite: bool = False,
        max_size: int | None = None,
        max_total: int | None = None,
    ) -> None:
        """Make the first file. Raises `RecordingError` as `RecordingWriter` does."""
        self.news: list[tuple[int, str]] = []
        """What is to be logged, with its level: whoever calls takes it away."""
        self._library = library
        self._max_size = max_size or 0
        self._max_total = max_total
        numbered = path.is_dir()
        self._part = 1
        self._writer = RecordingWriter(path, library, stem=stem, overwrite=overwrite)
        self._stem = stem if numbered else path.stem
        self._suffix = ".mcap" if numbered else path.suffix
        self._number = _number(self.path) if numbered else 1
        self._make_room()

    @property
    def path(self) -> Path:
        """The file that is written now."""
        return self._writer.path

    @property
    def traps(self) -> int:
        """How many that file has."""
        return self._writer.traps

    def add(self, part: int, chunk: PackedChunk) -> int:
        """Append a chunk to the file of that part; returns the bytes it takes there.

        Raises `RecordingError` when that file cannot be made.
        """
        if part != self._part:
            return self._add_to_next(part, chunk)
        before = self._writer.size
        self._writer.add(chunk)
        return self._writer.size - before

    def finish(self) -> None:
        """Write the index of the last file and close it."""
        self._writer.finish()

    def close(self) -> None:
        """Close it as it is."""
        self._writer.close()

    def _add_to_next(self, part: int, chunk: PackedChunk) -> int:
        last = self._writer
        self._next(part)
        try:
            self._writer.add(chunk)
        except OSError as error:
            # One of nothing but a header would be in the way.
            empty, self._writer = self._writer, last
            empty.close()
            empty.path.unlink(missing_ok=True)
            self.news = [each for each in self.news if not each[1].endswith(str(empty.path))]
            raise RecordingError(f"{empty.path}: {error.strerror}") from error
        return self._writer.size

    def _next(self, part: int) -> None:
        before, traps = self.path, self.traps
        self._writer.finish()
        self._writer = RecordingWriter(
            before.parent,
            self._library,
            stem=self._stem,
            suffix=self._suffix,
            after=self._number,
        )
        self._part = part
        self._number = _number(self.path)
        count = counted(traps, "trap was", "traps were")
        told = f"{before}: {count} recorded; it goes on in {self.path}"
        self.news.append((logging.INFO, told))
        self._make_room()

    def _make_room(self) -> None:
        if self._max_total is None:
            return
        folder, total = self.path.parent, self._max_total
        try:
            removed, size = make_room(folder, total, self._max_size)
        except OSError as error:
            self.news.append((logging.WARNING, f"{folder}: no room is made: {error.strerror}"))
            return
        for path in removed:
            told = f"{path}: removed, the oldest, so that recordings have {total} bytes at most"
            self.news.append((logging.INFO, told))
        if size > total:
            told = f"{folder}: recordings may come to {size} bytes: none more can be removed"
            self.news.append((logging.WARNING, told))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
