"""Large recordings, made without a server: as fast as messages can be framed."""

from pathlib import Path

from vmibridge import BridgeContext, BridgeHandler, BridgePacket, BridgeResponse, Gate, method
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.registers import read_packet
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
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
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

_CHUNK = 1 << 20
_VMS = ("red", "blue")
_VCPUS = 4
_START = 1_767_225_600_000_000_000
_EVERY = 50_000
"""Nanoseconds from one trap to the next."""
ADDRESS = 0x1_0000


class Add(BridgeHandler[str]):
    """Answers what these recordings have asked."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    @method(1)
    async def add(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        data = await vmi.memory.read_physical(ADDRESS, 16)
        assert int.from_bytes(data, "little") == packet.value1
        if fails(packet.value1):
            raise RuntimeError("told to")
        return BridgeResponse(packet.value1 + 1).with_output(f"output {packet.value1 % 1000}")


def fails(number: int) -> bool:
    """Whether this request is one of those that fail."""
    return number // 8 % 64 == 9


def write_recording(path: Path, traps: int) -> None:
    """A recording of two VMs with four vCPUs each. Each request reads memory once.

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
    waiting: dict[tuple[str, int], tuple[int, int]] = {}
    for number in range(traps):
        vm, vcpu = lane = lanes[number % len(lanes)]
        seqs[vm] += 1
        seq, time = seqs[vm], _START + number * _EVERY
        first, asked = waiting.pop(lane, (None, number))
        registers = Registers(
            rcx=STANDARD_MAGIC, rdx=0x0001_0100, r8=asked, r9=(1 << 64) - 1, cr3=0x7000
        )
        event = TrapEvent(seq, TrapReason.VMCALL, registers, vm, vcpu, 0x401000, 3)
        kind, answer, error, output = OutcomeKind.HANDLED, asked + 1, None, f"output {asked % 1000}"
        if number // len(lanes) % 16 == 0:
            kind, answer, output = OutcomeKind.WAITING, Gate.WAIT, None
            waiting[lane] = seq, asked
        elif fails(asked):
            kind, answer, error, output = OutcomeKind.FAILED, None, "RuntimeError: told to", None
        chunk.add(TRAP.id, time, event)
        if first is not None:
            chunk.add(NOTE.id, time, Note("retry", "asks again", vm, seq, first))
        else:
            data = asked.to_bytes(16, "little")
            chunk.add(MEMORY.id, time + 5_000, MemoryAccess(vm, seq, ADDRESS, 16, data))
        stamps = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4) if error is None else ()
        chunk.add(
            REPLY.id,
            time + 20_000,
            Reply(
                vm,
                seq,
                vcpu,
                kind,
                read_packet(event),
                RegisterWrites(0x401003, answer, None, *stamps),
                "add",
                error,
                None if output is None else f'"{output}"',
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
