"""How far a command has come with a recording: a bar, where it takes longer than a second.

On standard error, and only on a terminal; it is gone when the command is done.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vmibridge.recording.file.reader import RecordingReader

T = TypeVar("T")

_QUIET = 1.0
"""Seconds without a bar."""
_PERIOD = 0.1
"""Seconds from one look at the file to the next."""


class ReadingBar:
    """A bar for one pass over a recording, advanced by each item."""

    def __init__(self, reader: RecordingReader, label: str) -> None:
        self._reader = reader
        self._look_at = time.monotonic() + _QUIET
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(label, total=max(reader.size, 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self) -> None:
        """One more item is done."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _PERIOD
            self._bar.start()
            self._bar.update(self._task, completed=self._reader.bytes_read)


def with_progress(items: Iterable[T], reader: RecordingReader, label: str) -> Iterator[T]:
    """The same items, which come of a pass over `reader`, with a bar beside them."""
    with ReadingBar(reader, label) as bar:
        for item in items:
            bar.step()
            yield item
