"""Logging of the command line: one line a record, whatever a guest put into it."""

import logging
import select
import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

from vmibridge.text import counted, printable


class GuestSafeFormatter(logging.Formatter):
    """Escapes what is not printable; tracebacks only where they are asked for."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        line = printable(self.formatMessage(record))
        if record.exc_info and self._tracebacks:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *map(printable, trace)])
        return line


class _ConsoleHandler(logging.Handler):
    """Above the live table, so that neither overwrites the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(self.format(record)))


class _ErrorOutput(logging.StreamHandler[TextIO]):
    """To standard error; what it cannot take at once is dropped and counted.

    A record is written on the event loop: a reader of standard error that has stopped must not stop
    all guests.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._poll = select.poll()
        self._poll.register(stream.fileno(), select.POLLOUT)
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not self._poll.poll(0):
            self._dropped += 1
            return
        dropped, self._dropped = self._dropped, 0
        if dropped:
            what = counted(dropped, "message was", "messages were")
            self.stream.write(f"WARNING {__name__}: {what} dropped: not read\n")
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in logging
        """A full disk, or a closed pipe: there is no other place to report it."""


def log_handler(level: str, console: Console | None) -> logging.Handler:
    """To standard error, or through the console that shows a live table."""
    handler: logging.Handler = _to_stderr() if console is None else _ConsoleHandler(console)
    handler.setFormatter(GuestSafeFormatter(tracebacks=level == "debug"))
    handler.setLevel(level.upper())
    return handler


def _to_stderr() -> logging.Handler:
    try:
        return _ErrorOutput(sys.stderr)
    except OSError:
        # No file at all, as where a program that embeds the command has put another object.
        return logging.StreamHandler(sys.stderr)
