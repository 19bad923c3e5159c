"""Logging of the command line: one line a record, whatever a guest put into it."""

import logging
import sys

from rich.console import Console
from rich.text import Text

from vmibridge.text import printable


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


def log_handler(level: str, console: Console | None) -> logging.Handler:
    """To standard error, or through the console that shows a live table."""
    handler: logging.Handler = (
        logging.StreamHandler(sys.stderr) if console is None else _ConsoleHandler(console)
    )
    handler.setFormatter(GuestSafeFormatter(tracebacks=level == "debug"))
    handler.setLevel(level.upper())
    return handler
