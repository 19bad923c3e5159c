"""Large recordings, made without a server: as fast as messages can be framed."""

from pathlib import Path

from vmibridge.arch import read_packet
from vmibridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.event import Registers, RegisterWrites, TrapEvent, TrapReason
from vmibridge.outcome import OutcomeKind
from vmibridge.recording.chunk import ChunkBuilder
from vmibridge.recording.messages import (
    MEMORY,
    NOTE,
    REPLY,
    SESSION,
    TRAP,
    MemoryAccess,
    Note,
    RecordedHandler,
    RecordedMethod,
    Reply,
    Session,
)
from vmibridge.recording.writer import RecordingWriter

_CHUNK = 1 << 20
_VMS = ("red", "blue")
_VCPUS = 4
_START = 1_767_225_600_000_000_000
_EVERY = 50_000
"""Nanoseconds from one trap to the next."""


def write_recording(path: Path, traps: int) -> None:
    """A recording of two VMs with four vCPUs each. Each trap reads memory once.

    One of 16 traps is told to wait, and the next of its vCPU is its retry; one of 64 fails.
    """
    writer = RecordingWriter(path, "vmibridge benchmark")
    chunk = ChunkBuilder()
    handler = RecordedHandler(
        "add", "bench.Add", 0x0100, STANDARD_MAGIC, methods=(RecordedMethod(1, "add"),)
    )
    for vm in _VMS:
        chunk.add(SESSION.id, _START, Session(vm, handlers=(handler,)))
    lanes = [(vm, vcpu) for vm in _VMS for vcpu in range(_VCPUS)]
    seqs = dict.fromkeys(_VMS, 0)
    waiting: dict[tuple[str, int], int] = {}
    for number in range(traps):
        vm, vcpu = lane = lanes[number % len(lanes)]
        seqs[vm] += 1
        seq, time = seqs[vm], _START + number * _EVERY
        turn = number // len(lanes)
        registers = Registers(
            rcx=STANDARD_MAGIC, rdx=0x0001_0100, r8=number, r9=(1 << 64) - 1, cr3=0x7000
        )
        event = TrapEvent(seq, TrapReason.VMCALL, registers, vm, vcpu, 0x401000, 3)
        kind = OutcomeKind.HANDLED
        if turn % 16 == 0:
            kind = OutcomeKind.WAITING
        elif turn % 64 == 9:
            kind = OutcomeKind.FAILED
        first = waiting.pop(lane, None)
        if kind is OutcomeKind.WAITING:
            waiting[lane] = seq
        chunk.add(TRAP.id, time, event)
        if first is not None:
            chunk.add(NOTE.id, time, Note("retry", "asks again", vm, seq, first))
        chunk.add(
            MEMORY.id,
            time + 5_000,
            MemoryAccess(vm, seq, 0x10000 + number % 4096, 16, number.to_bytes(16, "little")),
        )
        chunk.add(
            REPLY.id,
            time + 20_000,
            Reply(
                vm,
                seq,
                vcpu,
                kind,
                read_packet(event),
                RegisterWrites(
                    0x401003, number + 1, None, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
                ),
                "add",
                "told to" if kind is OutcomeKind.FAILED else None,
                f'"output {number % 1000}"' if kind is OutcomeKind.HANDLED else None,
                20e-6,
                first,
            ),
        )
        if len(chunk) >= _CHUNK:
            writer.add(chunk.pack())
            chunk = ChunkBuilder()
    for vm in _VMS:
        chunk.add(NOTE.id, _START + traps * _EVERY, Note("end", f"{seqs[vm]} traps", vm))
    writer.add(chunk.pack())
    writer.finish()
