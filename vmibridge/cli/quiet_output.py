"""What a command shows that runs for months: failures, one line a minute, and the summary.

A line for each trap fills a disk at the rate of the guest. Here a guest that makes its handlers
fail gets `_MAX_FAILURES` lines a minute; the line of the minute says how many more there were.
"""

from collections.abc import Mapping
from typing import Any, Self

import anyio
import msgspec
from anyio import sleep
from anyio.abc import TaskGroup

from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.cli.output import StreamWriter, Writer, stream_writer
from vmibridge.cli.streams import encoded, json_line
from vmibridge.cli.trap_line import summary_text
from vmibridge.engine.summary import Summary
from vmibridge.text import counted

__all__ = ["QuietWriter", "stdout_writer"]

_MINUTE = 60.0
"""Seconds."""
_MAX_FAILURES = 10
"""Lines of failures in a minute."""
_FAILURES = frozenset({OutcomeKind.FAILED, OutcomeKind.TIMEOUT, OutcomeKind.CANCELLED})


class QuietWriter(Writer):
    """Shows by `lines`, which it alone uses, for several tasks."""

    def __init__(self, lines: StreamWriter, *, as_json: bool) -> None:
        self._lines = lines
        self._as_json = as_json
        self._minute = Summary()
        self._total = 0
        self._failures = 0
        self._writing = anyio.Lock()
        self._gone: BrokenPipeError | None = None
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._show_minutes)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        self.close()

    def close(self) -> None:
        self._lines.close()

    async def write(self, line: bytes) -> None:
        """As `StreamWriter.write`, one at a time."""
        async with self._writing:
            await self._lines.write(line)

    async def show(self, outcome: Outcome[Any]) -> None:
        if self._gone is not None:
            raise self._gone
        self._minute.outcomes[outcome.kind] += 1
        self._total += 1
        if outcome.kind in _FAILURES:
            self._failures += 1
            if self._failures <= _MAX_FAILURES:
                async with self._writing:
                    await self._lines.show(outcome)

    async def end(self, summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit]) -> None:
        async with self._writing:
            await self._lines.end(summaries, exits)

    async def _show_minutes(self) -> None:
        while self._gone is None:
            await sleep(_MINUTE)
            try:
                await self.write(self._minute_line())
            except BrokenPipeError as gone:
                # For whoever shows the next outcome: here it would be one of a task group.
                self._gone = gone

    def _minute_line(self) -> bytes:
        minute, self._minute = self._minute, Summary()
        hidden, self._failures = max(self._failures - _MAX_FAILURES, 0), 0
        if self._as_json:
            counts = {kind.value: count for kind, count in minute.outcomes.items()}
            line = {**counts, "total": minute.total, "so_far": self._total, "hidden": hidden}
            return json_line(msgspec.json.encode({"minute": line}))
        told = f"a minute: {summary_text(minute)}; {counted(self._total, 'trap')} so far"
        if hidden:
            told += f"; {counted(hidden, 'failure')} not shown"
        return encoded(f"{told}\n")


def stdout_writer(*, as_json: bool, outcomes: bool) -> StreamWriter | QuietWriter:
    """What writes lines to standard output: one a trap, or with `outcomes` false few."""
    lines = stream_writer(1, as_json=as_json)
    return lines if outcomes else QuietWriter(lines, as_json=as_json)
