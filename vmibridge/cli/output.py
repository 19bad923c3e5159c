"""Standard output, or a file, without stopping the event loop.

| the reader | what happens |
|---|---|
| is slow | its guest is slowed |
| takes nothing for 10 seconds, or the disk is full | lines are dropped, and counted |
| has gone | `BrokenPipeError`: the run ends |

| writer | for |
|---|---|
| `JsonWriter` | `--json` |
| `LineWriter` | people, where it is no terminal |
| `TableWriter` | people at a terminal |
| `QuietWriter` (`quiet_output`) | `--quiet`, by one of the first two |
"""

import errno
import logging
import os
import select
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Self

import anyio
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.cli.guest_exits import NO_EXITS
from vmibridge.cli.outcome_file import OutcomeFile
from vmibridge.cli.streams import encoded, json_line, quiet_stdout
from vmibridge.cli.trap_line import COLUMNS, summary_json, summary_text, trap_columns, trap_json
from vmibridge.engine.summary import Summary
from vmibridge.errors import RecordingError
from vmibridge.text import counted

log: logging.Logger = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds in which a reader that takes nothing holds its guest."""
_WIDTHS = (6, 4, 9, 12, 20, 9, 38, 7)
# At a narrow terminal these give their room to the output.
_WIDE_ONLY = ("magic/request/method", "answer")
_NARROW = 120
_STYLES = {
    OutcomeKind.HANDLED: "green",
    OutcomeKind.REJECTED: "yellow",
    OutcomeKind.UNMATCHED: "yellow",
    OutcomeKind.WAITING: "cyan",
    OutcomeKind.DENIED: "magenta",
}


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Standard output, for a command that needs no event loop.

    The block ends quietly when the reader has gone. Raises `RecordingError` when what was read
    cannot be written.
    """
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except OSError as error:
        quiet_stdout()
        if not isinstance(error, BrokenPipeError):
            raise RecordingError(f"standard output: {error.strerror}") from error


class Writer(ABC):
    """Shows the outcomes of one run. Raises `BrokenPipeError` when the reader has gone."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""

    @abstractmethod
    async def show(self, outcome: Outcome[Any]) -> None:
        """Show one outcome. Cancelled, a line may be left in part."""

    @abstractmethod
    async def end(self, summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit]) -> None:
        """Show the counts of the VMs and what their guests exited with, by their names."""


class StreamWriter(Writer):
    """Bytes to a file descriptor, waiting for it on the loop when it is full."""

    def __init__(self, fd: int, file: OutcomeFile | None = None) -> None:
        sys.stdout.flush()
        self._fd = fd
        self._file = file
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._rest = b""
        """Of a line that was begun."""
        self._is_blocked = False
        self._reported = 0
        self.dropped: int = 0
        """Outcomes that were not written."""

    async def write(self, line: bytes, *, is_outcome: bool = True) -> None:
        """Write a line, or drop it whole; one that was begun is finished before the next.

        A pipe that polls as writable takes PIPE_BUF bytes without blocking.
        """
        data = self._rest + line
        try:
            if self._file is not None and not self._rest:
                self._file.make_room(len(line))
            while data:
                if not self._poll.poll(0):
                    await self._wait()
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            if len(data) >= len(line):
                data = data[: len(data) - len(line)]
                self.dropped += is_outcome
            if not self._is_blocked:
                self._is_blocked = True
                self._warn("%s: outcomes are dropped until they can be written", error.strerror)
        else:
            if self._is_blocked:
                self._is_blocked = False
                self._report_dropped()
        finally:
            self._rest = data

    def close(self) -> None:
        self._report_dropped()

    async def _wait(self) -> None:
        """Raises `TimeoutError` for a reader that takes nothing, at once where that is known."""
        if not self._is_blocked:
            with anyio.move_on_after(_PATIENCE):
                while not self._poll.poll(0):
                    await anyio.wait_writable(self._fd)
                return
        raise TimeoutError(errno.ETIMEDOUT, f"not read for {_PATIENCE:g} seconds")

    def _report_dropped(self) -> None:
        if self.dropped > self._reported:
            self._reported = self.dropped
            self._warn("%s dropped", counted(self.dropped, "outcome was", "outcomes were"))

    def _warn(self, text: str, value: object) -> None:
        what = "standard output" if self._fd == 1 else "the output of outcomes"
        log.warning("%s: " + text, what, value)


class JsonWriter(StreamWriter):
    """One JSON object a line."""

    async def show(self, outcome: Outcome[Any]) -> None:
        await self.write(json_line(trap_json(outcome)))

    async def end(self, summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit]) -> None:
        summary = json_line(summary_json(summaries, exits, self.dropped))
        await self.write(summary, is_outcome=False)


class LineWriter(StreamWriter):
    """One plain line a trap."""

    async def __aenter__(self) -> Self:
        await self.write(_line(COLUMNS), is_outcome=False)
        return self

    async def show(self, outcome: Outcome[Any]) -> None:
        await self.write(_line(trap_columns(outcome)))

    async def end(self, summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit]) -> None:
        whole = Summary.of_all(summaries.values())
        await self.write(encoded(f"{summary_text(whole, exits)}\n"), is_outcome=False)


def _line(columns: list[str]) -> bytes:
    cells = [cell.ljust(width) for cell, width in zip(columns, _WIDTHS, strict=False)]
    return encoded(f"{' '.join([*cells, columns[-1]]).rstrip()}\n")


def stream_writer(fd: int, *, as_json: bool, file: OutcomeFile | None = None) -> StreamWriter:
    """The writer for where there is no terminal. `file`: what `fd` is, where it has a bound."""
    return (JsonWriter if as_json else LineWriter)(fd, file)


class TableWriter(Writer):
    """A live table of the latest traps over the counts, eight times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._latest: deque[Outcome[Any]] = deque(maxlen=max(4, min(20, console.height - 8)))
        self._summary = Summary()
        self._exits = NO_EXITS
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=8, transient=False
        )

    async def __aenter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        self._live.stop()

    async def show(self, outcome: Outcome[Any]) -> None:
        self._latest.append(outcome)
        self._summary.outcomes[outcome.kind] += 1

    async def end(self, summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit]) -> None:
        self._summary = Summary.of_all(summaries.values())
        self._exits = exits
        self._live.refresh()

    def _render(self) -> Group:
        narrow = self._console.width < _NARROW
        shown = [at for at, name in enumerate(COLUMNS) if not (narrow and name in _WIDE_ONLY)]
        table = Table(expand=True, box=SIMPLE_HEAD, pad_edge=False)
        for at in shown:
            last = COLUMNS[at] == "output"
            table.add_column(
                COLUMNS[at],
                no_wrap=True,
                overflow="ellipsis",
                ratio=1 if last else None,
                min_width=None if last else min(_WIDTHS[at], 9),
            )
        for outcome in list(self._latest):
            cells = [Text(cell) for cell in trap_columns(outcome)]
            cells[COLUMNS.index("outcome")].stylize(_STYLES.get(outcome.kind, "red"))
            table.add_row(*[cells[at] for at in shown])
        return Group(table, Text(summary_text(self._summary, self._exits)))
