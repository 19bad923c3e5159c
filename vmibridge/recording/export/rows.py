"""Traps and accesses as rows of tables, the same for each format that has tables.

| kind | is |
|---|---|
| `TEXT`, `REAL`, `BOOL`, `BYTES` | what the word says |
| `BITS` | 64 bits without a sign |
| `TIME` | nanoseconds since the Unix epoch |

`registers` is a JSON object; it leaves out those that are 0, and `rflags` where it is 2.
"""

from collections.abc import Callable, Iterator
from enum import Enum, auto

import msgspec

from vmibridge.recording.traps import ANSWER_NAMES, VALUE_NAMES, RecordedTrap, flattened

Row = tuple[int | float | str | bytes | None, ...]

_MAX_TIME = (1 << 63) - 1
_registers = msgspec.json.Encoder().encode


class Kind(Enum):
    """What a column holds; see the table of this module."""

    TEXT = auto()
    REAL = auto()
    BOOL = auto()
    BYTES = auto()
    BITS = auto()
    TIME = auto()


TRAP_COLUMNS = {
    "trap": Kind.BITS,  # counts the rows, from 1
    "vm": Kind.TEXT,
    "vcpu": Kind.BITS,
    "seq": Kind.BITS,
    "time": Kind.REAL,  # seconds since the first trap of the recording
    "time_ns": Kind.TIME,
    "reply_ns": Kind.TIME,
    "reason": Kind.TEXT,
    "width": Kind.BITS,
    "ring": Kind.BITS,
    "ip": Kind.BITS,
    "address_space": Kind.BITS,
    "magic": Kind.BITS,
    "request": Kind.BITS,
    "method": Kind.BITS,
    **dict.fromkeys(VALUE_NAMES, Kind.BITS),
    "outcome": Kind.TEXT,  # null: no reply
    "handler": Kind.TEXT,
    "error": Kind.TEXT,
    "output": Kind.TEXT,
    "duration_us": Kind.REAL,
    "retry_of": Kind.BITS,
    "rip": Kind.BITS,  # where the guest went on; null: the instruction ran natively
    **dict.fromkeys(ANSWER_NAMES, Kind.BITS),  # null: the register was left alone
    "accesses": Kind.BITS,
    "registers": Kind.TEXT,
}

ACCESS_COLUMNS = {
    "trap": Kind.BITS,
    "place": Kind.BITS,  # among the accesses of its trap, from 0
    "address": Kind.BITS,
    "size": Kind.BITS,
    "write": Kind.BOOL,
    "error": Kind.TEXT,  # null: it was done
    "data": Kind.BYTES,  # null: left out, or a read that failed
}


def trap_row(number: int, trap: RecordedTrap, start: int, bits: Callable[[int], int]) -> Row:
    """One row of `TRAP_COLUMNS`; `bits` makes 64 bits fit the table."""
    event, flat = trap.event, flattened(trap)
    return (
        number,
        event.vm,
        bits(event.vcpu),
        bits(event.seq),
        (trap.time - start) / 1e9,
        min(trap.time, _MAX_TIME),
        None if trap.reply_time is None else min(trap.reply_time, _MAX_TIME),
        event.reason.value,
        bits(event.width),
        bits(event.ring),
        bits(event.ip),
        bits(event.address_space),
        flat.magic,
        flat.request,
        flat.method,
        *[None if value is None else bits(value) for value in flat.values],
        flat.outcome,
        flat.handler,
        flat.error,
        flat.output,
        None if flat.duration is None else flat.duration * 1e6,
        *[
            None if value is None else bits(value)
            for value in (flat.retry_of, flat.rip, *flat.answers)
        ],
        len(trap.accesses) + trap.left_out,
        _registers(event.registers).decode(),
    )


def access_rows(number: int, trap: RecordedTrap, bits: Callable[[int], int]) -> Iterator[Row]:
    """The rows of `ACCESS_COLUMNS` of one trap."""
    for place, access in enumerate(trap.accesses):
        yield (
            number,
            place,
            bits(access.address),
            bits(access.size),
            access.write,
            access.error,
            access.data,
        )
