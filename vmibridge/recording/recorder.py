"""Records what a server does.

    async with Recorder("run.mcap") as recorder:
        server = BridgeServer(backend, bridge, taps=[recorder])
        async for outcome in server.run():
            ...

Rules:

- On the loop a message is encoded into a buffer; a thread compresses and writes.
- At any moment, what is not in the file yet is at most `flush_traps` traps, and one for
  each vCPU beyond the first. None of them is older than `flush_interval`, as long as the
  disk keeps up and the loop runs. When the disk does not keep up, the guests wait
  (`full`): nothing is dropped.
- When the file cannot be written any more, nothing waits for it. What is next was chosen
  before: the VMs are stopped, or go on unrecorded; `lost` counts the traps.
- Where files have a size (`max_size`), the recording goes on in another one (`rotation`), and
  the oldest ones make room (`file.folder`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.aio.clock import loop_clock
from vmibridge.aio.own_thread import in_own_thread
from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Bridge, one_line
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.registers import read_packet
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Step as StepKind
from vmibridge.engine.taps import Tap
from vmibridge.errors import RecordingError, ServerStateError
from vmibridge.recording.file.chunk import ChunkBuilder
from vmibridge.recording.file.parts import RecordingParts
from vmibridge.recording.messages import (
    MEMORY,
    NOTE,
    REPLY,
    SESSION,
    STEP,
    TRAP,
    ChannelKind,
    MemoryAccess,
    Note,
    Reply,
    output_text,
)
from vmibridge.recording.redaction import Redaction, RedactionRule
from vmibridge.recording.rotation import Rotation, sizes
from vmibridge.recording.session import session_of
from vmibridge.recording.steps import Steps
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import TrapEvent

log: logging.Logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""
_MAX_UNWRITTEN = 32 << 20
"""The same, of all that is not written yet: then the guests wait."""
_NOTHING: frozenset[str] = frozenset()


class Recorder(Tap):
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
        max_total: int | None = None,
    ) -> None:
        """`path` is a new file, or a folder, where a new one is numbered after `stem`.

        `max_size` bytes are the most that a file has: then the recording goes on in another one.
        `max_total` are those of all recordings of the folder: the oldest ones are removed.

        Raises `ValueError` if a number is out of range, `ConfigError` for a wrong rule.
        """
        if not flush_interval > 0:
            raise ValueError(f"flush_interval is a number of seconds, got {flush_interval!r}")
        if flush_traps < 2:
            raise ValueError(f"flush_traps is at least 2, got {flush_traps!r}")
        self.path: Path = Path(path)
        """Of the file that is written, from when it is made."""
        self._max_size, self._max_total = sizes(max_size, max_total)
        if max_total is not None and not self.path.is_dir():
            raise ValueError(f"max_total is for recordings in a folder, and {path} is none")
        self.lost: int = 0
        """Traps that were taken after the file could not be written any more. If the recorder was
        dropped, those of that VM are counted when the VM has ended."""
        self.error: RecordingError | None = None
        """Why it could not be written."""
        # Half a period fills up while the other half is being written.
        self._interval = flush_interval / 2
        self._cut_at = flush_traps // 2
        self._max_traps = flush_traps
        self._on_error = on_error
        self._redaction = Redaction(redact)
        self._redacts = bool(self._redaction.rules)
        self._left_out: dict[tuple[str, int], frozenset[str]] = {}
        self._stem = stem
        self._overwrite = overwrite
        self._files: RecordingParts
        self._rotation = None if self._max_size is None else Rotation(self._max_size)
        self._stops: dict[str, Callable[[Exception], None]] = {}
        self._architectures: dict[str, Architecture[Any]] = {}
        self._chunk = ChunkBuilder()
        self._waiting: deque[ChunkBuilder] = deque()
        self._unwritten = 0
        self._unwritten_traps = 0
        self._wake: anyio.Event | None = None
        self._room: anyio.Event | None = None
        self._clock = time.monotonic
        self._epoch = time.time_ns() - time.monotonic_ns()
        self._taken: float | None = None
        self._sources: dict[str, Source] = {}
        self._steps = Steps()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        """Make the file. Raises `RecordingError` when it already exists, or cannot be made."""
        self._clock = loop_clock()
        self._epoch = time.time_ns() - round(self._clock() * 1e9)
        library = f"vmibridge {version('vmibridge')}"
        self._files = await in_own_thread(
            lambda: RecordingParts(
                self.path,
                library,
                stem=self._stem,
                overwrite=self._overwrite,
                max_size=self._max_size,
                max_total=self._max_total,
            )
        )
        self._tell_news()
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
        # A cancellation from outside would come out of it, and the file would be left open.
        self._tasks.cancel_scope.shield = True
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        self._tasks = None
        with anyio.CancelScope(shield=True):
            await self._write_waiting()
            finish = self._files.finish if self.error is None else self._files.close
            try:
                await in_own_thread(finish)
            except OSError as lost:
                self._fail(lost)
        if self.error is None:
            log.info("%s: %d traps were recorded", self.path, self._files.traps)
        else:
            log.error("%s; %d traps were not recorded", self.error, self.lost)
            if self._on_error == "stop" and kind is None:
                raise self.error

    # --- what a server tells --------------------------------------------------------

    async def room(self) -> None:
        """Wait for the disk."""
        while self.full:
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

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
        if self.error is not None and self._on_error == "stop":
            stop(self.error)
        architecture = self._architectures.pop(vm, X86)
        session = session_of(
            vm,
            bridge,
            settings,
            self._redaction,
            architecture,
            self._sources.pop(vm, None),
            self._epoch,
        )
        if self._rotation is not None:
            session = self._rotation.begin(session)
        self._add(SESSION, session)
        self._cut()

    def trap(self, event: TrapEvent) -> None:
        if self._redacts:
            left_out = self._redaction.of(read_packet(event).request)
            if left_out:
                self._left_out[event.vm, event.seq] = left_out
            event = self._redaction.trap(event, left_out)
        if self._rotation is not None:
            self._split_if_due()
            self._rotation.trap(event)
        # Handlers may be given this time: it is that of the trap, to the nanosecond.
        self._add(TRAP, event, self._taken)
        self._taken = None
        self._chunk.traps += 1
        if self._chunk.traps >= self._cut_at:
            self._cut()

    def retried(self, event: TrapEvent, first: int) -> None:
        text = f"trap {event.seq} asks again for what came with trap {first}"
        self._add(NOTE, Note("retry", text, event.vm, event.seq, first))

    def handler_stepped(self, event: TrapEvent, first: int, step: StepKind) -> None:
        for told in self._steps.step(event.vm, first, step):
            self._split_if_due()
            self._add(STEP, told)

    def read(
        self, event: TrapEvent, address: int, size: int, data: bytes | None, error: str | None
    ) -> None:
        self._access(event, MemoryAccess(event.vm, event.seq, address, size, data, False, error))

    def wrote(self, event: TrapEvent, address: int, data: bytes, error: str | None) -> None:
        self._access(
            event, MemoryAccess(event.vm, event.seq, address, len(data), data, True, error)
        )

    def answered(self, outcome: Outcome[Any]) -> None:
        event, output, packet, writes = (
            outcome.event,
            outcome.output,
            outcome.packet,
            outcome.writes,
        )
        assert event is not None
        error = outcome.error
        if self._steps.lined_up:
            self._steps.lined_up.discard((event.vm, event.seq))
        text = output_text(output)
        if self._redacts and (left_out := self._left_out.pop((event.vm, event.seq), None)):
            packet = self._redaction.packet(packet, left_out)
            writes = None if writes is None else self._redaction.writes(writes, left_out)
            text, error = None, None if error is None else "left out"
        self._add(
            REPLY,
            Reply(
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
            ),
        )
        if self._rotation is not None:
            self._rotation.answered(event, outcome)
        self.full: bool = (
            self._unwritten_traps + self._chunk.traps >= self._max_traps
            or self._unwritten >= _MAX_UNWRITTEN
        ) and self.error is None

    def end(self, vm: str, summary: Summary) -> None:
        counts = {kind.value: count for kind, count in summary.outcomes.items()}
        if self._stops.pop(vm, None) is None:
            return
        if self._rotation is not None:
            self._rotation.end(vm)
        text = f"{summary.total} traps"
        self._add(NOTE, Note("end", text, vm, counts={**counts, "native": summary.native}))

    def dropped(self, vm: str, error: Exception) -> None:
        """What must not happen: it could not take an event. The recording ends here, and
        the runs end or go on as if the file could not be written."""
        self._fail(error)

    def missed_traps(self, vm: str, count: int) -> None:
        self.lost += count

    # --- into the file --------------------------------------------------------------

    def _access(self, event: TrapEvent, access: MemoryAccess) -> None:
        if self._redacts and "memory" in self._left_out.get((event.vm, event.seq), _NOTHING):
            access = msgspec.structs.replace(access, data=None)
        if self._rotation is not None:
            self._split_if_due(len(access.data or b""))
        self._add(MEMORY, access)
        if self._unwritten >= _MAX_UNWRITTEN and self.error is None:
            self.full = True

    def _add(self, channel: ChannelKind, message: Any, at: float | None = None) -> None:
        if self._steps.pending is not None:
            self._add(STEP, self._steps.flush(), at)
        if self.error is not None:
            self.lost += channel is TRAP
            return
        time_ns = self._epoch + int((self._clock() if at is None else at) * 1e9)
        if self._chunk.add(channel.id, time_ns, message) >= _CHUNK:
            self._cut()

    def _split_if_due(self, data: int = 0) -> None:
        """Go on in another file, where this one has no room for a message with so much data."""
        rotation = self._rotation
        if (
            rotation is None
            or self.error is not None
            or not rotation.is_due(len(self._chunk), data)
        ):
            return
        self._cut()
        self._chunk.part = rotation.next_part()
        for channel, message in rotation.preamble():
            self._add(channel, message)
        rotation.begun(len(self._chunk))

    def _cut(self) -> None:
        """Hand what is collected to the writer."""
        chunk = self._chunk
        if not len(chunk):
            return
        self._waiting.append(chunk)
        self._unwritten += len(chunk)
        self._unwritten_traps += chunk.traps
        self._chunk = ChunkBuilder(chunk.part)
        if self._rotation is not None:
            self._rotation.cut(len(chunk))
        if self._wake is not None:
            self._wake.set()

    async def _write_on(self) -> None:
        """Write chunks as they are cut, and what is left at each interval."""
        while True:
            self._wake = anyio.Event()
            if not self._waiting:
                with anyio.move_on_after(self._interval):
                    await self._wake.wait()
            with anyio.CancelScope(shield=True):
                await self._write_waiting()

    async def _write_waiting(self) -> None:
        """Write all that is collected."""
        self._cut()
        while self._waiting and self.error is None:
            chunk = self._waiting.popleft()
            try:
                size = await in_own_thread(self._write, chunk)
            except Exception as lost:
                self._fail(lost)
                return
            finally:
                self._tell_news()
            if self._rotation is not None:
                self._rotation.written(chunk.part, len(chunk), size)
            self._written(chunk)

    def _tell_news(self) -> None:
        self.path = self._files.path
        while self._files.news:
            level, told = self._files.news.pop(0)
            log.log(level, "%s", told)

    def _written(self, chunk: ChunkBuilder) -> None:
        self._unwritten -= len(chunk)
        self._unwritten_traps -= chunk.traps
        if self.error is not None:
            # It was being written when the recorder was dropped, and counted as lost.
            self.lost -= chunk.traps
        # A small chunk, or one without traps, makes too little room.
        if (
            self._unwritten_traps + self._chunk.traps < self._max_traps
            and self._unwritten < _MAX_UNWRITTEN
        ):
            self._free()

    def _write(self, chunk: ChunkBuilder) -> int:
        return self._files.add(chunk.part, chunk.pack())

    def _fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        why = error.strerror if isinstance(error, OSError) else one_line(error)
        if isinstance(error, RecordingError):
            why = str(error)  # of the file that it was to go on in
        self.error = RecordingError(f"{self.path}: the recording ends here: {why}")
        self.error.__cause__ = error
        self.lost += self._unwritten_traps + self._chunk.traps
        self._waiting.clear()
        self._chunk = ChunkBuilder()
        self._free()
        if self._on_error == "continue":
            log.error("%s; the run continues without a recording", self.error)
            return
        for stop in self._stops.values():
            stop(self.error)

    def _free(self) -> None:
        self.full = False
        if self._room is not None:
            self._room.set()
            self._room = None
