"""`-` among the files of a command: standard input and standard output."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from vmibridge.errors import ConfigError
from vmibridge.text import printable

__all__ = ["STDOUT", "clean_up_at_sigterm", "output_file", "say", "stdin_or"]

STDOUT = Path("-")


def clean_up_at_sigterm() -> None:
    """By default it ends a process at once, which would leave behind what is half-done."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def say(line: str) -> None:
    """A line for people, on standard error: standard output may be what was made."""
    sys.stderr.write(f"{printable(line)}\n")


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """A new file to write instead of `target`; that of `-` goes to standard output when it is
    whole, at the end of the block.

    Raises `ConfigError` for a terminal, `RecordingError` where it cannot be written.
    """
    if target != STDOUT:
        yield target
        return
    if sys.stdout.isatty():
        raise ConfigError("-o -: standard output is a terminal; name a file, or pipe it on")
    from vmibridge.cli.output import standard_output

    with tempfile.TemporaryDirectory(prefix="vmibridge-") as folder:
        path = Path(folder) / "output"
        yield path
        with path.open("rb") as made, standard_output() as out:
            shutil.copyfileobj(made, out, 1 << 20)


@contextmanager
def stdin_or(path: Path) -> Iterator[BinaryIO]:
    """A file to be read from its start to its end; `-` is standard input. Raises `OSError`."""
    if path == STDOUT:
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file
