"""Records what a server does.

    async with Recorder("run.mcap") as recorder:
        server = BridgeServer(backend, bridge, taps=[recorder])
        async for outcome in server.run():
            ...

Rules:

- On the loop messages are held, and encoded `_HELD` at a time. A small chunk is compressed there,
  too, because a thread would wait for the GIL longer than that takes; a large one in the thread
  that writes.
- At any moment, what is not in the file yet is at most `flush_traps` traps, and one for
  each vCPU beyond the first. None of them is older than `flush_interval`, as long as the
  disk keeps up and the loop runs. When the disk does not keep up, the guests wait
  (`full`): nothing is dropped.
- While the volume is full, the guests are held, or go on with a gap in the recording (`chunked`):
  that was chosen before. When the file cannot be written for another reason, nothing waits for it:
  the VMs are stopped, or go on unrecorded. `lost` counts the traps, `hindrance` says how it is now.
- Where files have a size or a time, the recording goes on in another one (`rotation`), and
  the oldest ones make room (`file.folder`).
"""

import logging
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.aio.clock import loop_clock
from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.registers import read_packet
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Step as StepKind
from vmibridge.engine.taps import Tap
from vmibridge.errors import ServerStateError
from vmibridge.recording.chunked import MAX_UNWRITTEN, ChunkedRecording
from vmibridge.recording.file.chunk_builder import other_packet
from vmibridge.recording.file.folder import Bounds
from vmibridge.recording.file.parts import RecordingParts
from vmibridge.recording.messages import (
    MEMORY,
    NOTE,
    OUTSIDE,
    REPLY,
    SESSION,
    STEP,
    TRAP,
    ChannelKind,
    MemoryAccess,
    Note,
    Outside,
    Reply,
    Session,
)
from vmibridge.recording.outputs import OutputText
from vmibridge.recording.redaction import Redaction, RedactionRule
from vmibridge.recording.rotation import Rotation, part_size
from vmibridge.recording.session import session_of
from vmibridge.recording.steps import Steps
from vmibridge.text import counted
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.conductor import OutsideCall
from vmibridge.vm.trap import TrapEvent

log: logging.Logger = logging.getLogger(__name__)

_HELD = 128
"""Messages that are encoded together: about 100 us."""
_HELD_DATA = 1024
"""Bytes of a memory access that is not held."""
_NOTHING: frozenset[str] = frozenset()
_NO_OUTPUT = OutputText(None, None)


class Recorder(ChunkedRecording, Tap):
    """A tap that writes all it sees into a file, or into several, one after another."""

    def __init__(
        self,
        path: Path | str,
        *,
        flush_interval: float = 0.2,
        flush_traps: int = 1000,
        on_error: Literal["stop", "continue"] = "stop",
        redact: Iterable[RedactionRule | str] = (),
        stem: str = "run",
        overwrite: bool = False,
        max_size: int | None = None,
        max_age: float | None = None,
        max_total: int | None = None,
        max_files: int | None = None,
        message_index: bool = False,
    ) -> None:
        """`path` is a new file, or a folder, where a new one is numbered after `stem`.

        `message_index` adds message indexes, for tools that look up single messages: a file of
        small traps is twice as large with them. `max_size` bytes and `max_age` seconds are the most
        that a file has: then the recording goes on in another one. `max_total` are the bytes, and
        `max_files` the number, of all recordings of the folder: the oldest ones are removed.

        `on_error` says what becomes of the guests when there is no room on the volume: with "stop"
        they are held until there is, and nothing is lost; with "continue" they go on, and the
        recording has a gap. After any other error they are stopped, or go on unrecorded.

        Raises `ValueError` if a number is out of range, `ConfigError` for a wrong rule.
        """
        if not flush_interval > 0:
            raise ValueError(f"flush_interval is a number of seconds, got {flush_interval!r}")
        if flush_traps < 2:
            raise ValueError(f"flush_traps is at least 2, got {flush_traps!r}")
        size = self._max_size = part_size(max_size, max_age, max_total, max_files)
        for name, bound in (("max_total", max_total), ("max_files", max_files)):
            if bound is not None and not Path(path).is_dir():
                raise ValueError(f"{name} is for recordings in a folder, and {path} is none")
        self._bounds = None if max_total is max_files is None else Bounds(max_total, max_files)
        # After a gap a recording goes on in another file.
        splits = on_error == "continue" or (size, max_age) != (None, None)
        rotation = Rotation(size, max_age) if splits else None
        super().__init__(
            Path(path),
            flush_interval=flush_interval,
            flush_traps=flush_traps,
            on_error=on_error,
            message_index=message_index,
            rotation=rotation,
        )
        self._redaction = Redaction(redact)
        self._redacts = bool(self._redaction.of_traps)
        # What is left out, and where a file ends, is decided trap by trap.
        self._joins = not self._redacts and rotation is None
        self._looks_at_packets = False
        self._left_out: dict[tuple[str, int], frozenset[str]] = {}
        self._stem = stem
        self._overwrite = overwrite
        self._architectures: dict[str, Architecture[Any]] = {}
        self._clock = time.monotonic
        self._epoch = time.time_ns() - time.monotonic_ns()
        self._taken: float | None = None
        self._sources: dict[str, Source] = {}
        self._counts_vms = rotation is not None
        """Whether a chunk counts the traps of each VM: for one VM it need not."""
        self._steps = Steps()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        """Make the file. Raises `RecordingError` when it already exists, or cannot be made for
        another reason than that the volume is full: then it is made when there is room."""
        self._clock = loop_clock()
        self._epoch = time.time_ns() - round(self._clock() * 1e9)
        library = f"vmibridge {version('vmibridge')}"
        await self._open(
            RecordingParts(
                self.path,
                library,
                stem=self._stem,
                overwrite=self._overwrite,
                max_size=self._max_size,
                bounds=self._bounds,
            )
        )
        tasks = self._tasks = await anyio.create_task_group().__aenter__()
        tasks.start_soon(self._write_on)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is left and the index. Shielded from cancellation.

        Raises `RecordingError` where `on_error` is "stop" and it cannot be written.
        """
        assert self._tasks is not None
        await self.finish()
        # A cancellation from outside would come out of it.
        self._tasks.cancel_scope.shield = True
        await self._tasks.__aexit__(None, None, None)
        self._tasks = None
        if self.error is not None and self._on_error == "stop" and kind is None:
            raise self.error

    # --- what a server tells --------------------------------------------------------

    def source(self, vm: str, source: Source) -> None:
        self._sources[vm] = source

    def taken_at(self, started: float) -> None:
        self._taken = started

    def machine(self, vm: str, architecture: Architecture[Any]) -> None:
        self._architectures[vm] = architecture

    def begin(
        self, vm: str, bridge: Bridge, settings: ServerSettings, stop: Callable[[Exception], None]
    ) -> None:
        if self._tasks is None:
            stop(
                ServerStateError(
                    "the recorder is not open: use it in 'async with Recorder(...) as recorder:'"
                )
            )
            return
        self._stops[vm] = stop
        self._told.pop(vm, None)
        self._first_vm = self._first_vm or vm
        self._counts_vms = self._counts_vms or vm != self._first_vm
        if self.error is not None and self._on_error == "stop":
            stop(self.error)
        # A dispatcher of one's own may tell of another packet than that of the trap.
        self._looks_at_packets |= not all(entry.handler for entry in bridge.entries)
        session = self._session_of(vm, bridge, settings)
        if self._rotation is not None:
            session = self._rotation.begin(session)
        self._add(SESSION, session)
        self._cut()

    def handlers_reloaded(self, vm: str, bridge: Bridge, settings: ServerSettings) -> None:
        if vm not in self._stops:
            return
        self._looks_at_packets |= not all(entry.handler for entry in bridge.entries)
        if self._rotation is None:
            text = f"{vm}: its handlers were reloaded: from here on others answer than it names"
            self._add(NOTE, Note("lost", text, vm))
            return
        self._rotation.begin(self._session_of(vm, bridge, settings))
        if self._takes_messages:
            self._split(self._rotation)

    def _session_of(self, vm: str, bridge: Bridge, settings: ServerSettings) -> Session:
        architecture, source = self._architectures.get(vm, X86), self._sources.get(vm)
        return session_of(vm, bridge, settings, self._redaction, architecture, source, self._epoch)

    def trap(self, event: TrapEvent) -> None:
        chunk, taken = self._chunk, self._taken
        if not self._joins or taken is None or self._steps.pending is not None:
            self._take(event)
            return
        # The usual case: the answer to it is what comes next.
        if chunk.taken is not None:
            chunk.part_plain()
        chunk.taken, chunk.taken_at = event, self._epoch + int(taken * 1e9)
        chunk.traps += 1
        if self._counts_vms:
            chunk.traps_of[event.vm] = chunk.traps_of.get(event.vm, 0) + 1
        if chunk.traps >= self._cut_at:
            self._cut()

    def _take(self, event: TrapEvent) -> None:
        if self._redacts:
            left_out = self._redaction.of(read_packet(event).request)
            if left_out:
                self._left_out[event.vm, event.seq] = left_out
            event = self._redaction.trap(event, left_out)
        if self._rotation is not None:
            self._split_if_due()
            self._rotation.trap(event)
        self._add(TRAP, event, self._taken)
        # Handlers may be given this time: it is that of the trap, to the nanosecond.
        self._taken = None
        if self._takes_messages:
            chunk = self._chunk
            chunk.traps += 1
            if self._counts_vms:
                chunk.traps_of[event.vm] = chunk.traps_of.get(event.vm, 0) + 1
            if chunk.traps >= self._cut_at:
                self._cut()

    def retried(self, event: TrapEvent, first: int) -> None:
        text = f"trap {event.seq} asks again for what came with trap {first}"
        self._add(NOTE, Note("retry", text, event.vm, event.seq, first))

    def handler_stepped(self, event: TrapEvent, first: int, step: StepKind) -> None:
        for told in self._steps.step(event.vm, first, step):
            self._split_if_due()
            self._add(STEP, told)

    def outside_called(self, event: TrapEvent, first: int, call: OutsideCall) -> None:
        outside = Outside(
            event.vm, first, call.key, call.number, call.data, call.error, call.types, call.at_once
        )
        if self._redacts and self._redaction.of(read_packet(event).request):
            outside = outside.without_content()
        self._add_large(OUTSIDE, outside, outside.data)

    def read(
        self, event: TrapEvent, address: int, size: int, data: bytes | None, error: str | None
    ) -> None:
        self._access(event, MemoryAccess(event.vm, event.seq, address, size, data, False, error))

    def wrote(self, event: TrapEvent, address: int, data: bytes, error: str | None) -> None:
        self._access(
            event, MemoryAccess(event.vm, event.seq, address, len(data), data, True, error)
        )

    def answered(self, outcome: Outcome[Any]) -> None:
        chunk, event, response = self._chunk, outcome.event, outcome.response
        # Made into text now: a handler may change what it gave.
        text, digest = (
            _NO_OUTPUT
            if response is None or response.output is None
            else OutputText.of(response.output)
        )
        taken = self._taken
        if (
            event is not None
            and chunk.taken is event
            and taken is not None
            and outcome.retry_of is None
            and self._steps.pending is None
        ):
            chunk.taken = None
            duration, plain = outcome.duration, chunk.plain
            plain.append(
                (
                    chunk.taken_at,
                    event,
                    self._epoch + int((taken + duration) * 1e9),
                    outcome.kind,
                    outcome.writes,
                    outcome.handler,
                    outcome.error,
                    text,
                    duration,
                    digest,
                    other_packet(outcome) if self._looks_at_packets else None,
                )
            )
            if len(plain) >= _HELD:
                self._settle()
        else:
            self._answer(outcome, text, digest)
        if self._unwritten:
            self._hold_guests()

    def _answer(self, outcome: Outcome[Any], text: str | None, digest: str | None) -> None:
        event, packet, writes, error = outcome.event, outcome.packet, outcome.writes, outcome.error
        assert event is not None
        if self._steps.pending is not None:
            self._add(STEP, self._steps.flush())
        self._steps.lined_up.discard((event.vm, event.seq))
        if self._redacts and (left_out := self._left_out.pop((event.vm, event.seq), None)):
            packet = self._redaction.packet(packet, left_out)
            writes = None if writes is None else self._redaction.writes(writes, left_out)
            text, digest = _NO_OUTPUT
            error = None if error is None else "left out"
        reply = Reply(
            event.vm,
            event.seq,
            event.vcpu,
            outcome.kind,
            packet,
            writes,
            outcome.handler,
            error,
            text,
            outcome.duration,
            outcome.retry_of,
            digest,
        )
        self._add(REPLY, reply)
        if self._rotation is not None:
            self._rotation.answered(event, outcome)

    def end(self, vm: str, summary: Summary) -> None:
        counts = {kind.value: count for kind, count in summary.outcomes.items()}
        if self._stops.pop(vm, None) is None:
            return
        self._architectures.pop(vm, None)
        self._sources.pop(vm, None)
        if self._rotation is not None:
            self._rotation.end(vm)
        text = counted(summary.total, "trap")
        self._add(NOTE, Note("end", text, vm, counts={**counts, "native": summary.native}))

    def dropped(self, vm: str, error: Exception) -> None:
        """What must not happen: it could not take an event. The recording ends here, and
        the runs end or go on as if the file could not be written."""
        self._fail(error)

    def unrecorded(self, vm: str) -> int:
        self._told[vm] = self._lost_of[vm]
        return self._told[vm]

    def missed_traps(self, vm: str, count: int) -> None:
        self.lost += count

    # --- into the file --------------------------------------------------------------

    def _access(self, event: TrapEvent, access: MemoryAccess) -> None:
        if self._redacts and "memory" in self._left_out.get((event.vm, event.seq), _NOTHING):
            access = msgspec.structs.replace(access, data=None)
        self._add_large(MEMORY, access, access.data)

    def _add_large(self, channel: ChannelKind, message: Any, data: bytes | None) -> None:
        """Add a message that may have much data."""
        if self._rotation is not None:
            self._split_if_due(len(data or b""))
        self._add(channel, message)
        if data is not None and len(data) > _HELD_DATA:
            self._settle()
        # Not for room for traps: a handler that waits gets a task of its own from then on.
        self.full = self._unwritten >= MAX_UNWRITTEN and self.error is None

    def _add(self, channel: ChannelKind, message: Any, at: float | None = None) -> None:
        if self._steps.pending is not None:
            self._add(STEP, self._steps.flush(), at)
        if self.error is not None or self._is_gap:
            if channel is TRAP:
                self.lost += 1
                self._lost_of[message.vm] += 1
            return
        chunk = self._chunk
        if chunk.plain or chunk.taken is not None:
            chunk.part_plain()
        held = chunk.held
        held.append((channel.id, self._time(at), message))
        if len(held) >= _HELD:
            self._settle()

    def _time(self, at: float | None = None) -> int:
        """A time of the loop, or now, in nanoseconds since the Unix epoch."""
        return self._epoch + int((self._clock() if at is None else at) * 1e9)

    def _flush_steps(self) -> None:
        if self._steps.pending is not None:
            # It stands behind its trap. The next part begins with its sessions.
            self._add(STEP, self._steps.flush())
