"""One pass over a recording: what its report tells.

The page shows the first traps, and of those behind them the ones that are looked for first:
the slowest of the recording and, up to a number, those that failed.
"""

import heapq
from typing import Any

from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.report.rows import (
    MAX_ACCESSES,
    MAX_BYTES,
    REGISTERS,
    Rows,
    clipped,
)
from vmibridge.recording.report.statistics import Statistics, nanoseconds
from vmibridge.recording.traps import OUTCOME_WORDS, RecordedTrap, outcome_word
from vmibridge.text import counted

SLOWEST = 50
MAX_FAILED = 1000
"""Of those behind the first ones."""
DEFAULT_LIMIT = 100_000
MAX_LIMIT = 500_000
"""Rows that each browser can scroll over."""
FAILED = frozenset({"failed", "timeout", "none"})
"""Outcomes that are shown wherever they are."""
_MAX_SESSIONS = 64
_MAX_HANDLERS = 256
_MAX_NOTES = 100
_MAX_WORDS = 200


class Collector:
    """Takes sessions, notes and traps in turn, and keeps what a page shows."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.count: int = 0
        """Traps so far."""
        self.limit = limit
        self.statistics: Statistics = Statistics()
        self.rows: Rows = Rows()
        self._sessions: list[dict[str, Any]] = []
        self._session_count = 0
        self._runs: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._notes: list[str] = []
        self._first: int | None = None
        self._last = 0
        # Duration, place (negative: the earlier of two is kept), run, trap; no trap for a row.
        self._slowest: list[tuple[int, int, int, RecordedTrap | None]] = []
        self._failed: dict[int, tuple[int, RecordedTrap]] = {}
        self._failed_behind = 0

    def hear(self, message: Session | Note) -> None:
        """What the recording has beside traps."""
        if isinstance(message, Session):
            self._session_count += 1
            if len(self._sessions) < _MAX_SESSIONS:
                self._runs[message.vm] = self._runs.get(message.vm, 0) + 1
                self._sessions.append(_session(message))
        elif message.kind == "end" and message.vm in self._runs:
            self._ended[message.vm] = self._ended.get(message.vm, 0) + 1
        elif message.kind == "lost" and len(self._notes) < _MAX_NOTES:
            self._notes.append(f"lost: {message.text[:_MAX_WORDS]}")

    def add(self, trap: RecordedTrap) -> None:
        """Take the next trap."""
        self.count += 1
        place, run = self.count, self._runs.get(trap.event.vm, 0)
        self.statistics.add(trap)
        self._first = trap.time if self._first is None else min(self._first, trap.time)
        self._last = max(self._last, trap.time, trap.reply_time or 0)
        shown = place <= self.limit
        if shown:
            self.rows.add(clipped(trap), place, run)
        elif outcome_word(trap) in FAILED:
            self._failed_behind += 1
            if len(self._failed) < MAX_FAILED:
                self._failed[place] = (run, clipped(trap))
        if trap.reply is None:
            return
        duration = nanoseconds(trap.reply.duration)
        if len(self._slowest) < SLOWEST or duration > self._slowest[0][0]:
            entry = (duration, -place, run, None if shown else clipped(trap))
            if len(self._slowest) < SLOWEST:
                heapq.heappush(self._slowest, entry)
            else:
                heapq.heapreplace(self._slowest, entry)

    def finish(self, reader: RecordingReader) -> dict[str, Any]:
        """What the page gets beside the rows; call it once, after the pass of `reader`."""
        first = len(self.rows)
        behind = dict(self._failed)
        for _, place, run, trap in self._slowest:
            if trap is not None:
                behind[-place] = (run, trap)
        row_of = {}
        for place in sorted(behind):
            run, trap = behind[place]
            row_of[place] = len(self.rows)
            self.rows.add(trap, place, run)
        slowest = sorted(self._slowest, key=lambda entry: (-entry[0], -entry[1]))
        return {
            "file": reader.path.name,
            "size": reader.size,
            "count": self.count,
            "first": first,
            "failed": len(self._failed),
            "failed_left_out": self._failed_behind - len(self._failed),
            "max_accesses": MAX_ACCESSES,
            "max_bytes": MAX_BYTES,
            "words": OUTCOME_WORDS,
            "registers": REGISTERS,
            # Text: nanoseconds since the epoch are more than JavaScript counts exactly.
            "start": str(self.rows.start),
            "began": str(self._first or 0),
            "span": self._last - (self._first or 0),
            "sessions": self._sessions,
            "problems": self._problems(reader),
            "slowest": [row_of.get(-place, -place - 1) for _, place, _, _ in slowest],
            **self.statistics.as_dict(),
        }

    def _problems(self, reader: RecordingReader) -> list[str]:
        lines = [str(problem) for problem in reader.problems]
        if reader.problem_count > len(lines):
            lines.append(counted(reader.problem_count - len(lines), "more problem"))
        if not reader.complete:
            lines.insert(0, "the file is truncated: what was recorded last may be missing")
        lines += [
            f"VM {vm[:_MAX_WORDS]}: the recording does not reach its end"
            for vm, runs in self._runs.items()
            if self._ended.get(vm, 0) < runs
        ]
        if self._session_count > len(self._sessions):
            more = self._session_count - len(self._sessions)
            lines.append(f"not described: {counted(more, 'more VM')}")
        if self.statistics.outcomes["none"]:
            lines.append(
                f"{counted(self.statistics.outcomes['none'], 'trap has', 'traps have')} no reply"
            )
        return [line[: 2 * _MAX_WORDS] for line in lines + self._notes]


def _session(session: Session) -> dict[str, Any]:
    handlers = session.handlers[:_MAX_HANDLERS]
    return {
        "vm": session.vm[:_MAX_WORDS],
        "started": session.started[:_MAX_WORDS],
        "loop": session.loop[:_MAX_WORDS],
        "versions": [
            f"{name} {version}"[:_MAX_WORDS] for name, version in session.versions.items()
        ][:_MAX_HANDLERS],
        "redaction": [str(rule) for rule in session.redaction[:_MAX_HANDLERS]],
        "more_handlers": len(session.handlers) - len(handlers),
        "handlers": [
            {
                "name": each.name[:_MAX_WORDS],
                "type": each.type[:_MAX_WORDS],
                "magic": None if each.magic is None else _hex(each.magic, 8),
                "request": each.request,
                "verify": [None if value is None else _hex(value) for value in each.verify_values],
                "methods": [
                    [method.code, method.name[:_MAX_WORDS]]
                    for method in each.methods[:_MAX_HANDLERS]
                ],
                "source": None if each.source is None else each.source[:_MAX_WORDS],
                "sha256": None if each.sha256 is None else each.sha256[:64],
            }
            for each in handlers
        ],
    }


def _hex(value: int, digits: int = 0) -> str:
    return f"{value:#0{digits + 2}x}"
