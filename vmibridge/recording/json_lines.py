"""Reads JSON lines: those of `vmibridge export --to jsonl`, and lines made by hand.

| a line has | it is |
|---|---|
| `seq`, and `trap` as a word | a trap with all that belongs to it: the fields of `FullTrapRecord` |
| the name of a channel, as `session` or `note`, as an object | one message: its struct |
| `summary` | of `vmibridge inspect --json --full`: left out |

Lines of `vmibridge run --json`, and of `inspect --json` without `--full`, lack what a recording has
of a trap, and the outputs of the former are other JSON: they are refused.

`place` orders the messages. Where a line has none, it follows the line before. A field that is not
given has its default: a trap has the time of the line before, registers that follow from `magic`,
`request`, `method` and `values`, and no reply without an `outcome`.

Nothing is believed: a line has a limit, a field that no line has is an error, and so is one of
another type. An error names the line.
"""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.errors import RecordingReadError, UnknownArchitectureError, UnsupportedTrapError
from vmibridge.recording.export.jsonl import (
    AccessRecord,
    FullTrapRecord,
    NoteRecord,
    OutsideRecord,
    TrapRecord,
)
from vmibridge.recording.file.reader import MAX_MESSAGE, TimedMessage
from vmibridge.recording.message_order import MAX_PLACE, MessageOrder
from vmibridge.recording.messages import (
    CHANNEL_OF_TOPIC,
    CHANNELS,
    FORMATS,
    MEMORY,
    OUTSIDE,
    TRAP,
    MemoryAccess,
    Outside,
    RecordedMessage,
    Reply,
    Session,
    architecture_of,
    trap_type,
)
from vmibridge.recording.new_recording import registers_for
from vmibridge.recording.vm_names import VmNames
from vmibridge.text import fault_of
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapReason

__all__ = ["MAX_LINE", "messages_of_lines"]

MAX_LINE = 80 << 20
"""Bytes of a line: one access to memory of the largest size, in hex, and its trap."""
_MAX_ERROR = 200
"""Characters of an error that may quote a line."""
_MAX_TIME = (1 << 64) - 1
_WRONG = (ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What a line raises that is none; msgspec's errors are ValueErrors, but not all."""
_OWN: Final = frozenset(FullTrapRecord.__struct_fields__)
_OF_A_RUN: Final = _OWN - {
    *("time", "time_ns", "ring", "ip", "address_space", "rip", "retry_of", "reads", "writes"),
    *("registers", "flags_known", "memory", "memory_left_out", "length", "notes"),
    *("place", "reply_place", "reply_ns", "reply", "outside"),
}
"""The fields of a line of `vmibridge run --json`, all of which it has."""
_TOPICS: Final = tuple(topic for topic, channel in CHANNEL_OF_TOPIC.items() if channel in CHANNELS)
"""Those of single messages: traps that stand together in a file have a line each."""
_MAKES_LINES = "'vmibridge export FILE --to jsonl' makes lines that are read"
_OF_A_LISTING: Final = frozenset(TrapRecord.__struct_fields__)
_AROUND: Final = frozenset(("place", "time_ns"))


class _Trap(msgspec.Struct):
    """A line of a trap: as `FullTrapRecord`, and nearly all of it may be left out."""

    seq: int
    trap: TrapReason
    vm: str = "vm"
    vcpu: int = 0
    time: float | None = None
    time_ns: int | None = None
    width: int = 64
    ring: int = 0
    ip: int = 0
    length: int = 0
    magic: int | None = None
    request: int | None = None
    method: int | None = None
    values: tuple[int, int, int, int] | None = None
    outcome: OutcomeKind | None = None
    response: tuple[int | None, int | None, int | None, int | None] | None = None
    rip: int | None = None
    output: str | None = None
    duration_us: float | None = None
    handler: str | None = None
    error: str | None = None
    retry_of: int | None = None
    registers: dict[str, int] | None = None
    flags_known: bool = True
    memory: list[AccessRecord] = []
    place: int | None = None
    reply_place: int | None = None
    reply_ns: int | None = None
    reply: dict[str, object] | None = None
    notes: list[NoteRecord] = []
    outside: list[OutsideRecord] = []


class _Line(msgspec.Struct):
    """What stands around a message."""

    place: int | None = None
    time_ns: int | None = None


def messages_of_lines(file: BinaryIO, name: str) -> Iterator[TimedMessage]:
    """The messages of a file, in the order of the recording.

    All lines are read before the first message is given; what waits is in a temporary file. Raises
    `RecordingReadError`, with `name` and the line, for what is no such line, and `RecordingError`
    where the temporary file cannot be written.
    """
    with MessageOrder() as order:
        lines = _Lines(order)
        number = 0
        try:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"a line has {MAX_LINE} bytes at most")
                if line.strip():
                    lines.add(line)
            order.flush()
        except OSError as error:
            raise RecordingReadError(f"{name}: {error.strerror}") from error
        except (
            ValueError,
            TypeError,
            OverflowError,
            RecursionError,
            msgspec.MsgspecError,
        ) as error:
            why = fault_of(error)
            why = why if len(why) <= _MAX_ERROR else f"{why[:_MAX_ERROR]}..."
            raise RecordingReadError(f"{name}: line {number}: {why}") from error
        yield from order


class _Lines:
    """Takes line after line. `add` raises `ValueError` and its like for one that is none."""

    def __init__(self, order: MessageOrder) -> None:
        self._order = order
        self._architectures: dict[str, Architecture[Any]] = {}
        self._names = VmNames()
        self._time = 0

    def add(self, line: bytes) -> None:
        parsed = msgspec.json.decode(line)
        if not isinstance(parsed, dict):
            raise ValueError("is not a JSON object")  # noqa: TRY004 - it is of a file
        topics = [topic for topic in _TOPICS if isinstance(parsed.get(topic), dict)]
        if isinstance(parsed.get("trap"), str):
            self._add_trap(parsed)
        elif len(topics) == 1:
            self._add_message(topics[0], parsed)
        elif list(parsed) != ["summary"]:
            raise ValueError(f"is neither a trap nor a message of a recording; {_MAKES_LINES}")

    # --- one message ------------------------------------------------------------------

    def _add_message(self, topic: str, parsed: dict[str, object]) -> None:
        _refuse_others(parsed, _AROUND | {topic})
        line = msgspec.convert(parsed, _Line)
        fields = parsed[topic]
        assert isinstance(fields, dict)
        channel = CHANNEL_OF_TOPIC[topic]
        _refuse_others(fields, frozenset(channel.kind.__struct_fields__))
        message: RecordedMessage
        if channel is TRAP:
            kind = trap_type(self._architectures.get(fields.get("vm", "vm"), X86))
            message = msgspec.convert(fields, kind)
        elif channel in (MEMORY, OUTSIDE):
            message = _with_data(fields, channel.kind)
        else:
            # Not strict: numbers that are not finite are strings.
            message = msgspec.convert(fields, channel.kind, strict=False)
        if isinstance(message, Session):
            self._begin(message)
        self._put(line.place, line.time_ns, message)

    def _begin(self, session: Session) -> None:
        if session.format not in FORMATS:
            raise ValueError(f"format {session.format} is not known; there are {FORMATS}")
        try:
            self._architectures[self._names.once(session.vm)] = architecture_of(session)
        except UnknownArchitectureError as error:
            raise ValueError(str(error)) from error

    def _put(self, place: int | None, time: int | None, message: RecordedMessage) -> None:
        place = self._order.next_place if place is None else place
        time = self._time if time is None else time
        if not 0 <= place <= MAX_PLACE:
            raise ValueError(f"place {place} has more than 63 bits")
        if not 0 <= time <= _MAX_TIME:
            raise ValueError(f"time_ns {time} is before 1970, or has more than 64 bits")
        self._time = time
        self._order.add(place, time, message)

    # --- a trap with all that belongs to it -------------------------------------------

    def _add_trap(self, parsed: dict[str, object]) -> None:
        if parsed.keys() == _OF_A_RUN:
            raise ValueError(
                "is of a server's --json, without registers and memory; record with --record FILE:"
                f" {_MAKES_LINES}"
            )
        if parsed.keys() == _OF_A_LISTING:
            raise ValueError(
                "is of 'vmibridge inspect --json' without --full, so without registers and memory;"
                f" {_MAKES_LINES}"
            )
        _refuse_others(parsed, _OWN)
        line = msgspec.convert(parsed, _Trap)
        parts: list[AccessRecord | OutsideRecord] = [*line.memory, *line.outside]
        if line.place is None:
            # What belongs to it stands behind it.
            line.reply_place = None
            for part in parts:
                part.place = None
        elif any(part.place is None for part in parts) or (
            line.outcome is not None and line.reply_place is None
        ):
            raise ValueError("has a place, and something of it has none")
        event = self._event(line)
        time = line.time_ns
        if time is None:
            time = self._time if line.time is None else _nanoseconds(line.time)
        self._put(line.place, time, event)
        for note in line.notes:
            self._put(note.place if line.place is not None else None, note.time_ns, note.note)
        for access in line.memory:
            data = None if access.data is None else _bytes(access.data)
            self._put(
                access.place,
                access.time_ns if access.time_ns is not None else time,
                MemoryAccess(
                    line.vm, line.seq, access.address, access.size, data, access.write, access.error
                ),
            )
        for call in line.outside:
            data = None if call.data is None else _bytes(call.data)
            self._put(
                call.place,
                call.time_ns if call.time_ns is not None else time,
                Outside(
                    line.vm,
                    line.seq,
                    call.key,
                    call.number,
                    data,
                    call.error,
                    call.types,
                    call.at_once,
                    call.left_out,
                ),
            )
        if line.outcome is None:
            return
        reply = _reply(line, line.outcome, event)
        self._put(
            line.reply_place,
            time + _nanoseconds(reply.duration) if line.reply_ns is None else line.reply_ns,
            reply,
        )

    def _event(self, line: _Trap) -> TrapEvent:
        architecture = self._architectures.get(line.vm, X86)
        if line.registers is not None:
            _refuse_others(line.registers, frozenset(architecture.registers.__struct_fields__))
            registers = msgspec.convert(line.registers, architecture.registers)
        elif line.request is None:
            registers = architecture.registers()
        else:
            try:
                registers = registers_for(_packet(line), line.trap, line.width, architecture)
            except UnsupportedTrapError as error:
                raise ValueError(str(error)) from error
        event: TrapEvent = trap_type(architecture)(
            line.seq,
            line.trap,
            registers,
            line.vm,
            line.vcpu,
            line.ip,
            line.length,
            line.width,
            line.ring,
            line.flags_known,
        )
        return event


def _reply(line: _Trap, kind: OutcomeKind, event: TrapEvent) -> Reply:
    fields: dict[str, object] = {
        "vm": line.vm,
        "seq": line.seq,
        "vcpu": line.vcpu,
        "kind": kind.value,
        "handler": line.handler,
        "error": line.error,
        "output": line.output,
        "duration": (line.duration_us or 0.0) / 1e6,
        "retry_of": line.retry_of,
    }
    packet = request_in(event)
    if packet is not None:
        fields["packet"] = msgspec.to_builtins(packet)
    if line.rip is not None or line.response is not None:
        rip = event.ip + event.length if line.rip is None else line.rip
        fields["writes"] = msgspec.to_builtins(RegisterWrites(rip, *(line.response or ())))
    fields.update(line.reply or {})
    _refuse_others(fields, frozenset(Reply.__struct_fields__))
    # Not strict: numbers that are not finite are strings.
    return msgspec.convert(fields, Reply, strict=False)


def _packet(line: _Trap) -> BridgePacket:
    return BridgePacket(line.magic or 0, line.request or 0, line.method or 0, *(line.values or ()))


def _with_data(fields: dict[str, object], kind: type[Any]) -> Any:
    data = fields.get("data")
    if data is None:
        return msgspec.convert(fields, kind)
    if not isinstance(data, str):
        raise ValueError("data is a string, in hex")  # noqa: TRY004 - it is of a file
    message = msgspec.convert({**fields, "data": None}, kind)
    return msgspec.structs.replace(message, data=_bytes(data))


def _bytes(text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise ValueError("data is not in hex") from None
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"data has {MAX_MESSAGE} bytes at most")
    return data


def _nanoseconds(seconds: float) -> int:
    if not math.isfinite(seconds):
        return 0
    if abs(seconds) > _MAX_TIME:
        raise ValueError(f"{seconds:g} seconds are more nanoseconds than 64 bits hold")
    return round(seconds * 1e9)


def _refuse_others(fields: dict[str, Any], known: frozenset[str]) -> None:
    for name in fields:
        if name not in known:
            raise ValueError(f"there is no field {name[:40]!r}")
