"""How far a command has come with a recording: a bar, where it takes longer than a second.

On standard error, and only on a terminal; it is gone when the command is done.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vmibridge.recording.reader import RecordingReader

T = TypeVar("T")

_QUIET = 1.0
"""Seconds without a bar."""
_EVERY = 256
"""Items from one look at the clock to the next."""


def with_progress(items: Iterable[T], reader: RecordingReader, label: str) -> Iterator[T]:
    """The same items, which come of a pass over `reader`, with a bar beside them."""
    if not sys.stderr.isatty():
        yield from items
        return
    shown_at = time.monotonic() + _QUIET
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(label, total=max(reader.size, 1))
    try:
        for number, item in enumerate(items):
            if number % _EVERY == 0:
                if not bar.live.is_started and time.monotonic() >= shown_at:
                    bar.start()
                bar.update(task, completed=reader.bytes_read)
            yield item
    finally:
        bar.stop()
