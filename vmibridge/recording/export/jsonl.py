"""JSON lines: one object a trap, in the order of the replies, and one for each other message.

The fields are those of `FullTrapRecord`. What a field of `registers` or of an access leaves out
is 0, or what the default of its struct says. Integers have up to 64 bits, as in the recording.

A message that belongs to no trap, such as a session, is an object with `place`, `time_ns` and
itself, under the name of its channel. So the lines have all that the recording has, and
`vmibridge.recording.json_lines` reads them back. What JSON has no word for, a number that is not
finite, is the string `inf`, `-inf` or `nan`.
"""

import math
from typing import BinaryIO, Final

import msgspec

from vmibridge.recording.export.exporter import OneFileExporter
from vmibridge.recording.export.selected import LeftOut
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import (
    CHANNELS,
    Note,
    RecordedMessage,
    Reply,
)
from vmibridge.recording.traps import RecordedTrap, flattened
from vmibridge.text import printable_json
from vmibridge.vm.trap import Registers


class AccessRecord(msgspec.Struct, omit_defaults=True, gc=False):
    """One access to guest memory."""

    address: int
    """Physical."""
    size: int
    data: str | None = None
    """In hex; left out where the recording has none."""
    write: bool = False
    error: str | None = None
    """Why it failed."""
    place: int | None = None
    """Among all messages of the recording, from 0."""
    time_ns: int | None = None
    """When it was done."""


class NoteRecord(msgspec.Struct, omit_defaults=True):
    """One note about a trap."""

    place: int
    time_ns: int
    note: Note


class OutsideRecord(msgspec.Struct, omit_defaults=True):
    """One call of `vmi.outside`; its fields are those of the message."""

    key: str
    number: int = 0
    data: str | None = None
    """In hex: the value, as MessagePack."""
    error: str | None = None
    types: tuple[str, ...] = ()
    at_once: bool = False
    left_out: bool = False
    place: int | None = None
    """Among all messages of the recording, from 0."""
    time_ns: int | None = None
    """When it had come to something."""


class TrapRecord(msgspec.Struct):
    """One trap of a recording."""

    seq: int
    vm: str
    vcpu: int
    time: float
    """Seconds since the first trap of the recording."""
    time_ns: int
    """Nanoseconds since the Unix epoch."""
    trap: str
    width: int
    ring: int
    ip: int
    address_space: int
    magic: int | None
    request: int | None
    method: int | None
    values: list[int] | None
    """These four are null for a trap that carries no request."""
    outcome: str | None
    """Null for a trap without a reply, as are all fields from here to `retry_of`."""
    response: list[int | None] | None
    """The four values as written; null where a register was left alone, or where the
    instruction ran natively."""
    rip: int | None
    """Where the guest went on."""
    output: str | None
    """The typed output as JSON text, or its `repr`."""
    duration_us: float | None
    handler: str | None
    error: str | None
    retry_of: int | None
    reads: int
    """Accesses to memory, those that failed included."""
    writes: int


class FullTrapRecord(TrapRecord):
    """The same, with what is long."""

    registers: Registers
    flags_known: bool
    """Whether `registers` has the flags as they were at the trap."""
    memory: list[AccessRecord]
    memory_left_out: int
    """Further accesses, which were too much to hold."""
    length: int
    """Bytes of the instruction."""
    place: int
    """Among all messages of the recording, from 0."""
    reply_place: int | None
    reply_ns: int | None
    reply: dict[str, object] | None
    """What the recorded reply has beside the fields above: its exact `duration` in seconds, and
    `packet` and `vcpu` where they are not those of the trap."""
    notes: list[NoteRecord]
    outside: list[OutsideRecord]


def trap_record(trap: RecordedTrap, start: int, *, full: bool = False) -> TrapRecord:
    """What JSON tells of one trap."""
    event, reply, flat = trap.event, trap.reply, flattened(trap)
    writes = sum(access.write for access in trap.accesses)
    fields = (
        event.seq,
        event.vm,
        event.vcpu,
        round((trap.time - start) / 1e9, 9),
        trap.time,
        event.reason.value,
        event.width,
        event.ring,
        event.ip,
        event.address_space,
        flat.magic,
        flat.request,
        flat.method,
        None if trap.packet is None else list(trap.packet.values),
        flat.outcome,
        None if flat.rip is None else list(flat.answers),
        flat.rip,
        flat.output,
        None if flat.duration is None else round(flat.duration * 1e6, 1),
        flat.handler,
        flat.error,
        flat.retry_of,
        len(trap.accesses) - writes,
        writes,
    )
    if not full:
        return TrapRecord(*fields)
    memory = [
        AccessRecord(
            access.address,
            access.size,
            None if access.data is None else access.data.hex(),
            access.write,
            access.error,
            *mark,
        )
        for access, mark in zip(
            trap.accesses, trap.access_marks or _NO_MARKS * len(trap.accesses), strict=True
        )
    ]
    return FullTrapRecord(
        *fields,
        event.registers,
        event.flags_known,
        memory,
        trap.left_out,
        event.length,
        trap.place,
        trap.reply_place,
        trap.reply_time,
        None if reply is None else _rest(trap, reply),
        [NoteRecord(*mark, note) for mark, note in trap.notes],
        [
            OutsideRecord(
                call.key,
                call.number,
                None if call.data is None else call.data.hex(),
                call.error,
                call.types,
                call.at_once,
                call.left_out,
                *mark,
            )
            for mark, call in trap.outside
        ],
    )


_NO_MARKS: list[tuple[None, None]] = [(None, None)]
_SAID: Final = frozenset(
    ("vm", "seq", "vcpu", "kind", "packet", "writes", "handler", "error", "output", "duration",
     "retry_of")
)  # fmt: skip
_UNSAID: Final = tuple(field for field in msgspec.structs.fields(Reply) if field.name not in _SAID)
"""Fields of a reply that the fields of a trap say nothing of."""


def _rest(trap: RecordedTrap, reply: Reply) -> dict[str, object]:
    rest: dict[str, object] = {"duration": in_json(reply.duration)}
    if reply.packet != trap.packet:
        rest["packet"] = msgspec.to_builtins(reply.packet)
    if reply.vcpu != trap.event.vcpu:
        rest["vcpu"] = reply.vcpu
    for field in _UNSAID:
        value = getattr(reply, field.name)
        if value != field.default:
            rest[field.name] = in_json(msgspec.to_builtins(value))
    return rest


def in_json(value: object) -> object:
    """Plain objects, with bytes in hex and a string for each number that JSON has no word for."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: in_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(each) for each in value]
    return value


_TOPICS: Final = {channel.kind: channel.topic for channel in CHANNELS}


def message_record(place: int, time: int, message: RecordedMessage) -> dict[str, object]:
    """What JSON tells of a message that belongs to no trap."""
    fields = in_json(msgspec.to_builtins(message, builtin_types=(bytes,)))
    return {"place": place, "time_ns": time, _TOPICS[type(message)]: fields}


class JsonLines(OneFileExporter):
    """Writes them to a binary file."""

    suffix = ".jsonl"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._encode = msgspec.json.Encoder().encode
        self._left_out = LeftOut()
        self._has_traps = False

    def other(self, place: int, timed: TimedMessage) -> None:
        """A line for each message that belongs to no trap."""
        self._left_out.hear(timed)
        self._write(place, timed)

    def leave_out(self, trap: RecordedTrap) -> None:
        """Lines at the end say so: what is made of them again has a note."""
        self._left_out.add(trap)

    def _write(self, place: int, timed: TimedMessage) -> None:
        line = printable_json(self._encode(message_record(place, *timed)))
        self._file.write(line + b"\n")

    def add(self, trap: RecordedTrap, start: int) -> None:
        self._has_traps = True
        line = printable_json(self._encode(trap_record(trap, start, full=True)))
        self._file.write(line + b"\n")

    def finish(self) -> None:
        for place, note in self._left_out.notes() if self._has_traps else ():
            self._write(place, note)
        self._file.flush()


EXPORTER = JsonLines
