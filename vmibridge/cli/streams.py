"""The standard streams of the process, as every command may rely on them.

A supervisor may start a process without some of them. Then Python has `None` for one, and the next
file that is opened, such as a guest's image or a socket, would get its number.
"""

import io
import os
import sys

from vmibridge.text import printable_json

__all__ = ["encoded", "is_of_stdout", "json_line", "prepare_streams", "quiet_stdout"]


def prepare_streams() -> None:
    """Open streams that are closed, and let an encoding that lacks a character escape it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one: those below it are open by now.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _Output(open(1, "wb", closefd=False), "utf-8", "backslashreplace")  # noqa: SIM115
        sys.stderr.write("vmibridge: standard output is closed: nothing is printed\n")
    if type(sys.stdout) is io.TextIOWrapper:
        by_line, encoding = sys.stdout.line_buffering, sys.stdout.encoding
        sys.stdout.flush()
        # The one before stays, with the same buffer: others may hold it.
        sys.stdout = _Output(
            sys.stdout.buffer, encoding, "backslashreplace", line_buffering=by_line
        )


def is_of_stdout(error: OSError) -> bool:
    """Whether it was standard output that failed so."""
    return isinstance(sys.stdout, _Output) and sys.stdout.error is error


class _Output(io.TextIOWrapper):
    """Standard output that knows how it failed: an `OSError` itself does not say of what it is."""

    error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.error = error
            raise


def quiet_stdout() -> None:
    """Write what is left, and all that follows, nowhere: Python flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def encoded(text: str) -> bytes:
    """As standard output is encoded, with escapes for the characters that it lacks."""
    return text.encode(sys.stdout.encoding or "utf-8", "backslashreplace")


def json_line(data: bytes) -> bytes:
    """A line of JSON for standard output, fit for a terminal."""
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    return printable_json(data, ascii_only=ascii_only) + b"\n"
