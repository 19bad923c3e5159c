"""JSON lines: one object a trap, in the order of the replies.

The fields are those of `TrapRecord`. What a field of `registers` or of an access leaves out
is 0, or what the default of its struct says. Integers have up to 64 bits, as in the recording.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from vmibridge.recording.export.exporter import Exporter
from vmibridge.recording.traps import RecordedTrap
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


def trap_record(trap: RecordedTrap, start: int, *, full: bool = False) -> TrapRecord:
    """What JSON tells of one trap."""
    event, packet, reply = trap.event, trap.packet, trap.reply
    answer = None if reply is None else reply.writes
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
        None if packet is None else packet.magic,
        None if packet is None else packet.request,
        None if packet is None else packet.method,
        None if packet is None else list(packet.values),
        None if reply is None else reply.kind.value,
        None if answer is None else list(answer.values),
        None if answer is None else answer.rip,
        None if reply is None else reply.output,
        None if reply is None else round(reply.duration * 1e6, 1),
        None if reply is None else reply.handler,
        None if reply is None else reply.error,
        None if reply is None else reply.retry_of,
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
        )
        for access in trap.accesses
    ]
    return FullTrapRecord(*fields, event.registers, event.flags_known, memory, trap.left_out)


class JsonLines(Exporter):
    """Writes them to a binary file."""

    suffix = ".jsonl"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._encode = msgspec.json.Encoder().encode

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """As of `Exporter`."""
        return cls(paths[0].open("wb"))

    def close(self) -> None:
        self._file.close()

    def add(self, trap: RecordedTrap, start: int) -> None:
        line = printable_json(self._encode(trap_record(trap, start, full=True)))
        self._file.write(line + b"\n")

    def finish(self) -> None:
        self._file.flush()


EXPORTER = JsonLines
