"""Opens what a recording is read from: a file, standard input, or a pipe.

A reader goes back and forth in a recording. So what cannot be sought, as a pipe, is first copied to
a temporary file, which nothing has a name for; what does not begin as a recording is not copied.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mcap.writer import MCAP0_MAGIC

from vmibridge.errors import RecordingReadError

__all__ = ["STANDARD_INPUT", "open_recording", "readable_again"]

STANDARD_INPUT = Path("-")
"""Standard input, by the name that commands have for it."""
_COPY = 1 << 20

_copied: list[BinaryIO] = []
"""Standard input, if it was read: it can be opened again."""


def open_recording(path: Path) -> BinaryIO:
    """Open it, to be read and sought. Raises `OSError`."""
    if path != STANDARD_INPUT:
        file = path.open("rb")
        return file if file.seekable() else _copy_and_close(file)
    if not _copied:
        given: BinaryIO = sys.stdin.buffer
        _copied.append(given if given.seekable() else _copy(given))
    # Each reader has a place of its own in it.
    return Path(f"/proc/self/fd/{_copied[0].fileno()}").open("rb")


@contextmanager
def readable_again(path: Path) -> Iterator[Path]:
    """What can be opened as often as one likes for the block, where `path` may be a pipe.

    Raises `RecordingReadError` for one that cannot be read.
    """
    if path == STANDARD_INPUT or not path.is_fifo():
        yield path
        return
    try:
        copy = open_recording(path)
    except OSError as error:
        raise RecordingReadError(f"{path}: {error.strerror}") from error
    with copy:
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def _copy_and_close(file: BinaryIO) -> BinaryIO:
    with file:
        return _copy(file)


def _copy(file: BinaryIO) -> BinaryIO:
    start = file.read(len(MCAP0_MAGIC))
    copy: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed with its reader
    copy.write(start)
    if start == MCAP0_MAGIC:
        shutil.copyfileobj(file, copy, _COPY)
    copy.flush()
    copy.seek(0, io.SEEK_SET)
    return copy
