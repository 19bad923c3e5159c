"""What a recording holds, trap by trap, for `vmibridge inspect`.

Whatever a file says goes through `printable` on its way to a terminal. What is held does not
grow with the file.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import msgspec

from vmibridge.cli.streams import encoded, json_line
from vmibridge.cli.trap_line import trap_cells
from vmibridge.recording.export.jsonl import trap_record
from vmibridge.recording.file.damage import recover_line
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.outside_text import outside_line
from vmibridge.recording.selection import SelectedTraps, Selection
from vmibridge.recording.traps import (
    NO_REPLY,
    OUTCOME_WORDS,
    RecordedTrap,
    access_text,
    outcome_word,
)
from vmibridge.text import counted, printable

_COLUMNS = {
    "time": 12,
    "seq": 6,
    "vcpu": 6,
    "trap": 9,
    "handler": 12,
    "magic/request/method": 20,
    "outcome": 9,
    "answer": 38,
    "us": 7,
    "output": 0,
}
_MAX_TEXT = 200
"""Characters of a cell."""
_MAX_LINE = 2000
_MAX_HANDLERS = 100


class Listing:
    """Writes the traps of a selection, and what the file says of itself."""

    def __init__(
        self,
        reader: RecordingReader,
        selection: Selection,
        out: BinaryIO,
        *,
        as_json: bool,
        full: bool,
    ) -> None:
        self._reader = reader
        self._selection = selection
        self._as_json = as_json
        self._full = full
        self._counts = Counter[str]()
        self._out = out
        self._encode = msgspec.json.Encoder().encode

    def show(self, limit: int | None) -> int:
        """Write it all, or `limit` traps; returns how many. Raises `RecordingReadError`."""
        traps = SelectedTraps(
            self._reader.messages(), self._selection, self._hear, reader=self._reader
        )
        shown = 0
        for trap in islice(traps, limit):
            self._counts[outcome_word(trap)] += 1
            if self._as_json:
                self._write_json(trap_record(trap, traps.start, full=self._full))
            else:
                if not shown:
                    self._write_line(_row(dict(zip(_COLUMNS, _COLUMNS, strict=True))))
                self._write_line(_row(_cells(trap, traps.start)))
                for line in _details(trap) if self._full else ():
                    self._write_line(_short(line, _MAX_LINE))
            shown += 1
        self._sum_up(stopped=shown == limit)
        return shown

    def _hear(self, message: Session | Note) -> None:
        if isinstance(message, Session):
            if self._as_json:
                self._write_json({"session": message})
            else:
                for line in _session(message):
                    self._write_line(_short(line, _MAX_LINE))
        elif message.kind == "lost" and not self._as_json:
            self._write_line(_short(f"lost: {message.text}", _MAX_LINE))

    def _sum_up(self, *, stopped: bool) -> None:
        reader, counts = self._reader, {word: self._counts[word] for word in OUTCOME_WORDS}
        total = self._counts.total()
        written = not stopped and reader.is_written
        truncated = not stopped and not reader.complete and not written
        if self._as_json:
            summary = {
                **counts,
                "total": total,
                "stopped": stopped,
                "truncated": truncated,
                "being_written": written,
                "problem_count": reader.problem_count,
                "problems": reader.problems,
            }
            self._write_json({"summary": summary})
            return
        words = {**dict.fromkeys(OUTCOME_WORDS), NO_REPLY: "without a reply"}
        text = [f"{count} {words[word] or word}" for word, count in counts.items() if count]
        self._write_line(f"{counted(total, 'trap')}: {', '.join(text) or 'none'}")
        if stopped:
            self._write_line("stopped at --limit: what is behind was not read")
        if written:
            # No problem, and the only one where it is the only one.
            self._write_line(_short(f"the file is being written: {self._follow()}", _MAX_LINE))
        for problem in reader.problems[: len(reader.problems) - written]:
            self._write_line(_short(f"problem {problem}", _MAX_LINE))
        if reader.problem_count > len(reader.problems):
            self._write_line(counted(reader.problem_count - len(reader.problems), "more problem"))
        if truncated or reader.problem_count > written:
            self._write_line(printable(recover_line(reader.path, truncated=truncated)))

    def _follow(self) -> str:
        return f"vmibridge inspect --follow {self._reader.path} shows what comes"

    def _write_json(self, value: Any) -> None:
        self._out.write(json_line(self._encode(value)))

    def _write_line(self, line: str) -> None:
        self._out.write(encoded(f"{line.rstrip()}\n"))


def _session(session: Session) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    handlers = [f"{each.name} ({each.request:#06x})" for each in session.handlers[:_MAX_HANDLERS]]
    if len(session.handlers) > _MAX_HANDLERS:
        handlers.append(f"{len(session.handlers) - _MAX_HANDLERS} more")
    left_out = ", ".join(map(str, session.redaction[:_MAX_HANDLERS]))
    part = f", part {session.part} of a recording" if session.part > 1 else ""
    return [
        f"vm {session.vm}: started {session.started or 'at a time unknown'}{part}",
        f"  on {session.loop or 'a loop unknown'}, with {versions or 'versions unknown'}",
        f"  handlers: {', '.join(handlers) or 'none'}",
        *([f"  left out: {left_out}"] if left_out else []),
    ]


def _cells(trap: RecordedTrap, start: int) -> dict[str, str]:
    reply = trap.reply
    text = "no reply"
    if reply is not None:
        text = reply.output or "" if reply.error is None else reply.error
        if reply.retry_of is not None:
            text = f"(retry of {reply.retry_of}) {text}"
    time = f"{(trap.time - start) / 1e9:.6f}"
    return {"time": time, **trap_cells(trap.event, trap.packet, reply, text)}


def _details(trap: RecordedTrap) -> Iterator[str]:
    registers = msgspec.to_builtins(trap.event.registers)
    yield f"    registers: {' '.join(f'{name}={value:x}' for name, value in registers.items())}"
    for access in trap.accesses:
        what = "wrote" if access.write else "read"
        size = counted(access.size, "byte")
        yield f"    {what} {size} at {access.address:#x}: {access_text(access)}"
    for _, call in trap.outside:
        yield f"    outside {outside_line(call)}"
    if trap.left_out:
        yield f"    further accesses, too much to hold: {trap.left_out}"


def _row(cells: dict[str, str]) -> str:
    return " ".join(_short(cells[name]).ljust(width) for name, width in _COLUMNS.items())


def _short(text: str, most: int = _MAX_TEXT) -> str:
    return printable(text if len(text) <= most else f"{text[:most]}...")
