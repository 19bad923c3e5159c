"""The traps that a page shows, column by column.

A column is a list of values, or, where values come again, a table of them and a list of
places in it. Numbers of 64 bits are given as hexadecimal text, for JavaScript rounds them.
Memory and text of all traps together are bounded; what has no room is marked.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from vmibridge.recording.messages import MemoryAccess
from vmibridge.recording.report.statistics import MAX_EXACT, key_of, label_of, nanoseconds
from vmibridge.recording.traps import (
    ANSWER_NAMES,
    OUTCOME_WORDS,
    VALUE_NAMES,
    RecordedTrap,
    flattened,
    outcome_word,
)
from vmibridge.vm.arch import ARCHITECTURES

MAX_ACCESSES = 32
"""Of one trap."""
MAX_BYTES = 256
"""Of one access."""
MAX_TEXT = 4096
"""Characters of an output or an error."""
_MAX_NAME = 100
_MAX_MEMORY = 32 << 20
"""Bytes of memory on one page."""
_MAX_TEXTS = 16 << 20
"""Characters on one page, after which texts are cut to `_SHORT`."""
_SHORT = 80
_MASK = (1 << 64) - 1

REGISTERS = tuple(dict.fromkeys(name for each in ARCHITECTURES for name in each.names))
"""Of all architectures; a trap has 0 for those of others."""
_NUMBER_OF_OUTCOME = {word: number for number, word in enumerate(OUTCOME_WORDS)}
_HEX = ("ip", *VALUE_NAMES, *ANSWER_NAMES, *(f"reg_{name}" for name in REGISTERS))
_WHOLE = ("seq", "width", "ring", "length", "left_out", "place")
_SIGNED = (
    *("lane", "run", "trap", "what", "magic", "request", "method", "outcome", "written"),
    *("error", "output", "duration", "taken", "accesses"),
)
_WRITTEN_AT_ALL = 16

_ACCESS_WRITE = 1
_ACCESS_NO_ROOM = 2


class Texts:
    """Texts, each once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}
        self._room = _MAX_TEXTS

    def number(self, text: str | None, most: int = MAX_TEXT) -> int:
        """Where it is in `all`; -1 for none."""
        if text is None:
            return -1
        kept = _cut(text, most if self._room > 0 else min(most, _SHORT))
        number = self._numbers.get(kept)
        if number is None:
            number = self._numbers[kept] = len(self.all)
            self.all.append(kept)
            self._room -= len(kept)
        return number


class Rows:
    """The traps, as they are added."""

    def __init__(self) -> None:
        self.texts: Texts = Texts()
        self.lanes: dict[tuple[int, int], int] = {}
        """By name of the VM, a text, and vCPU."""
        self._columns: dict[str, array[int]] = {name: array("Q") for name in (*_HEX, *_WHOLE)}
        self._columns |= {name: array("q") for name in _SIGNED}
        self._times = array("Q")
        self._retries: list[tuple[int, int]] = []
        self._accesses: list[MemoryAccess] = []
        self._access_flags = array("B")
        self._memory = _MAX_MEMORY

    def __len__(self) -> int:
        return len(self._times)

    def add(self, trap: RecordedTrap, place: int, run: int) -> None:
        """Add a trap, clipped. `place`: in the recording, from 1; `run`: of its VM."""
        event, flat, texts = trap.event, flattened(trap), self.texts
        lane = (texts.number(event.vm, _MAX_NAME), event.vcpu)
        written = sum(1 << at for at, value in enumerate(flat.answers) if value is not None)
        taken = None if trap.reply_time is None else trap.reply_time - trap.time
        values = {
            "ip": event.ip,
            "seq": event.seq,
            "width": event.width,
            "ring": event.ring,
            "length": event.length,
            "left_out": trap.left_out,
            "place": place,
            "lane": self.lanes.setdefault(lane, len(self.lanes)),
            "run": run,
            "trap": texts.number(event.reason.value),
            "what": texts.number(label_of(key_of(trap))),
            "magic": -1 if flat.magic is None else flat.magic,
            "request": -1 if flat.request is None else flat.request,
            "method": -1 if flat.method is None else flat.method,
            "outcome": _NUMBER_OF_OUTCOME[outcome_word(trap)],
            "written": written | (0 if flat.rip is None else _WRITTEN_AT_ALL),
            "error": texts.number(flat.error),
            "output": texts.number(flat.output),
            "duration": -1 if flat.duration is None else nanoseconds(flat.duration),
            "taken": -1 if taken is None else min(max(taken, 0), MAX_EXACT),
            "accesses": len(trap.accesses),
            **dict(zip(VALUE_NAMES, (value or 0 for value in flat.values), strict=True)),
            **dict(zip(ANSWER_NAMES, (value or 0 for value in flat.answers), strict=True)),
        }
        for name, column in self._columns.items():
            value = values[name] if name in values else getattr(event.registers, name[4:], 0)
            column.append(value if column.typecode == "q" else value & _MASK)
        if flat.retry_of is not None:
            self._retries.append((len(self), flat.retry_of))
        self._times.append(trap.time & _MASK)
        for access in trap.accesses:
            self._memory -= len(access.data or b"")
            has_room = access.data is None or self._memory >= 0
            self._accesses.append(
                access if has_room else msgspec.structs.replace(access, data=None)
            )
            self._access_flags.append(
                (_ACCESS_WRITE if access.write else 0) | (0 if has_room else _ACCESS_NO_ROOM)
            )

    def columns(self) -> Iterator[tuple[str, Any]]:
        """Everything, part by part, as JSON takes it."""
        start = self.start
        yield "lanes", [[vm, _whole(vcpu)] for vm, vcpu in self.lanes]
        yield "retries", [[row, _whole(seq & _MASK)] for row, seq in self._retries]
        # The differences are short, and alike.
        times = [time - start for time in self._times]
        yield "time", [now - before for before, now in zip([0, *times], times, strict=False)]
        for name, column in self._columns.items():
            if name in _HEX:
                yield name, _column([format(value, "x") for value in column])
            else:
                yield name, _column([_whole(value) for value in column])
        accesses = self._accesses
        yield "access_flags", _column(self._access_flags)
        for field in ("address", "size"):
            numbers = [format(getattr(access, field) & _MASK, "x") for access in accesses]
            yield f"access_{field}", _column(numbers)
        errors = [self.texts.number(access.error) for access in accesses]
        yield "access_error", _column(errors)
        yield "access_data", _column([_data(access) for access in accesses])
        # Last: what stands before may have added some.
        yield "texts", self.texts.all

    @property
    def start(self) -> int:
        """When the first of them was taken."""
        return min(self._times, default=0)


def clipped(trap: RecordedTrap) -> RecordedTrap:
    """The trap with no more than a page shows of it."""
    reply = trap.reply
    if reply is not None and len(reply.output or "") + len(reply.error or "") > MAX_TEXT:
        reply = msgspec.structs.replace(
            reply,
            output=None if reply.output is None else _cut(reply.output, MAX_TEXT),
            error=None if reply.error is None else _cut(reply.error, MAX_TEXT),
        )
    accesses = [
        access
        if access.data is None or len(access.data) <= MAX_BYTES
        else msgspec.structs.replace(access, data=access.data[:MAX_BYTES])
        for access in trap.accesses[:MAX_ACCESSES]
    ]
    return msgspec.structs.replace(
        trap,
        reply=reply,
        accesses=accesses,
        left_out=trap.left_out + len(trap.accesses) - len(accesses),
    )


def _data(access: MemoryAccess) -> str | None:
    return None if access.data is None else access.data.hex()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _whole(value: int) -> int | str:
    """A whole number, as text where JavaScript would round it."""
    return value if -MAX_EXACT <= value <= MAX_EXACT else str(value)


def _column(values: Sequence[Any]) -> dict[str, Any]:
    table = dict.fromkeys(values)
    if len(table) * 2 > len(values):
        # JSON has no arrays of Python's `array`.
        return {"rows": list(values)}
    places = {value: place for place, value in enumerate(table)}
    return {"table": list(table), "rows": [places[value] for value in values]}
