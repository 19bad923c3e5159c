"""Perfetto's own trace format: what happened when, on each vCPU.

| in the trace | is |
|---|---|
| a process | a VM |
| a thread | a vCPU |
| a slice | a trap, from when it was taken to its reply, named `handler/method` |
| its category | the outcome |
| its debug annotations | what was asked and answered, and how much memory was accessed |
| an instant | a trap without a reply |
| a flow | a request that was told to wait, from its first trap to its last retry |

Rules:

- A vCPU has one trap at a time. In a file that says otherwise a slice begins where the one
  before it ended, so that they nest in any case.
- A recording has the times of traps and of replies. Accesses to memory are shown as counts.
- Each packet is written by itself: field 1 of the message `Trace`, with its length before it.
"""

from collections.abc import Mapping
from typing import BinaryIO

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (  # type: ignore[import-untyped]
    TracePacket,
    TrackEvent,
)

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.export.exporter import OneFileExporter, unsigned
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.method_names import MethodNames
from vmibridge.recording.traps import (
    ANSWER_NAMES,
    VALUE_NAMES,
    RecordedTrap,
    flattened,
    outcome_word,
)

_REALTIME, _BOOTTIME = 1, 6
_SEQUENCE = 1
_CLEARED, _NEEDED = 1, 2
_MAX_TRACKS = 16_384
"""VMs and vCPUs; what is beyond goes to the track of the first trap."""
_HEX = frozenset(("magic", "request", "method", *VALUE_NAMES, *ANSWER_NAMES))
"""Which numbers the user interface shows in hex."""
_NAMES = {
    name: iid
    for iid, name in enumerate(
        (
            *("seq", "trap", "magic", "request", "method", *VALUE_NAMES, "outcome", *ANSWER_NAMES),
            *("output", "error", "bytes read", "bytes written", "failed accesses"),
        ),
        1,
    )
}


class Perfetto(OneFileExporter):
    """Writes the trace to a binary file."""

    suffix = ".perfetto-trace"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._names = MethodNames()
        self._processes: dict[str, int] = {}
        self._tracks: dict[tuple[str, int], int] = {}
        self._last: dict[int, int] = {}
        self._begun = False

    def hear(self, message: Session | Note) -> None:
        if isinstance(message, Session):
            self._names.learn(message)

    def add(self, trap: RecordedTrap, start: int) -> None:
        if not self._begun:
            self._begin(start)
            self._begun = True
        event, reply = trap.event, trap.reply
        track = self._track(event.vm, event.vcpu)
        begin = trap.time if reply is None else max(trap.time, self._last.get(track, 0))
        packet = _packet(begin)
        track_event = packet.track_event
        track_event.type = TrackEvent.TYPE_INSTANT if reply is None else TrackEvent.TYPE_SLICE_BEGIN
        track_event.track_uuid = track
        track_event.name = self._names.of(trap)
        track_event.categories.append(outcome_word(trap))
        if reply is not None and (reply.retry_of is not None or reply.kind is OutcomeKind.WAITING):
            first = event.seq if reply.retry_of is None else reply.retry_of
            flow = unsigned(self._processes.get(event.vm, 0) << 48 | first & (1 << 48) - 1)
            ends = reply.kind is not OutcomeKind.WAITING
            (track_event.terminating_flow_ids if ends else track_event.flow_ids).append(flow)
        _annotate(track_event, _facts(trap))
        self._write(packet)
        if reply is None:
            return
        end = max(begin, trap.time if trap.reply_time is None else trap.reply_time)
        self._last[track] = end
        packet = _packet(end)
        packet.track_event.type = TrackEvent.TYPE_SLICE_END
        packet.track_event.track_uuid = track
        self._write(packet)

    def finish(self) -> None:
        self._file.flush()

    def _begin(self, start: int) -> None:
        """The clock, and the names that annotations refer to."""
        packet = TracePacket()
        for clock in (_BOOTTIME, _REALTIME):
            packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=start)
        self._write(packet)
        packet = _packet(start)
        packet.sequence_flags = _CLEARED
        for name, iid in _NAMES.items():
            packet.interned_data.debug_annotation_names.add(iid=iid, name=name)
        self._write(packet)

    def _track(self, vm: str, vcpu: int) -> int:
        """The track of a vCPU, described in the trace when it is new."""
        track = self._tracks.get((vm, vcpu))
        if track is not None:
            return track
        if len(self._tracks) >= _MAX_TRACKS:
            return next(iter(self._tracks.values()))
        process = self._processes.get(vm)
        number = len(self._processes) + len(self._tracks) + 1
        if process is None:
            process = self._processes[vm] = number
            packet = TracePacket(trusted_packet_sequence_id=_SEQUENCE)
            packet.track_descriptor.uuid = process
            packet.track_descriptor.process.pid = process
            packet.track_descriptor.process.process_name = vm
            self._write(packet)
            number += 1
        self._tracks[vm, vcpu] = number
        packet = TracePacket(trusted_packet_sequence_id=_SEQUENCE)
        packet.track_descriptor.uuid = number
        packet.track_descriptor.parent_uuid = process
        packet.track_descriptor.thread.pid = process
        packet.track_descriptor.thread.tid = number
        packet.track_descriptor.thread.thread_name = f"vcpu {vcpu}"
        self._write(packet)
        return number

    def _write(self, packet: TracePacket) -> None:
        data = packet.SerializeToString()
        self._file.write(b"\x0a" + _varint(len(data)) + data)


def _packet(time: int) -> TracePacket:
    return TracePacket(timestamp=time, trusted_packet_sequence_id=_SEQUENCE, sequence_flags=_NEEDED)


def _facts(trap: RecordedTrap) -> dict[str, int | str]:
    event, flat = trap.event, flattened(trap)
    known: dict[str, int | str | None] = {
        "seq": event.seq,
        "trap": f"{event.reason.value}{event.width}",
        "magic": flat.magic,
        "request": flat.request,
        "method": flat.method,
        **dict(zip(VALUE_NAMES, flat.values, strict=True)),
        "outcome": flat.outcome,
        **dict(zip(ANSWER_NAMES, flat.answers, strict=True)),
        "output": flat.output,
        "error": flat.error,
    }
    facts = {name: value for name, value in known.items() if value is not None}
    if trap.accesses:
        done = [access for access in trap.accesses if access.error is None]
        facts["bytes read"] = sum(access.size for access in done if not access.write)
        facts["bytes written"] = sum(access.size for access in done if access.write)
        facts["failed accesses"] = len(trap.accesses) - len(done)
    return facts


def _annotate(event: TrackEvent, facts: Mapping[str, int | str]) -> None:
    for name, value in facts.items():
        annotation = event.debug_annotations.add()
        annotation.name_iid = _NAMES[name]
        if isinstance(value, str):
            annotation.string_value = value
        elif name in _HEX:
            annotation.pointer_value = unsigned(value)
        else:
            annotation.uint_value = unsigned(value)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


EXPORTER = Perfetto
