"""The file of a recorder: chunks that are collected on the loop and written in a thread.

A chunk is *collected* until it is full, or its time is up; it is *cut* then, and waits for those
before it to be written. What is collected and what waits together is bounded: beyond the bound
the recorder is `full`, and who records waits for `room`.

A volume that is full is not the end: the recorder is *hindered*, tries again each second, and goes
on when there is room.

| `on_error` | while the volume is full | then |
|---|---|---|
| stop | what is not written waits; each vCPU is held behind its next answer | nothing is missing |
| continue | what is not written is given up; its traps are counted | another part, which says so |

Every other error ends the recording, and with "stop" the runs.
"""

import errno
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio

from vmibridge.aio.loops import parking
from vmibridge.aio.own_thread import in_own_thread
from vmibridge.aio.parking import Parking
from vmibridge.bridge.dispatch import one_line
from vmibridge.engine.taps import Hindrance
from vmibridge.errors import RecordingError
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.parts import RecordingParts
from vmibridge.recording.messages import NOTE, SESSION, ChannelKind, Note
from vmibridge.recording.rotation import Rotation
from vmibridge.text import counted

__all__ = ["MAX_UNWRITTEN", "NO_ROOM", "ChunkedRecording"]

log: logging.Logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""
MAX_UNWRITTEN = 32 << 20
"""The same, of all that is not written yet: then the guests wait."""
_SMALL = 256 << 10
"""Bytes of a chunk that the loop compresses: about 300 us."""
_AGAIN = 1.0
"""Seconds between two tries to write to a volume that is full."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a volume that is full, or of a quota."""


class ChunkedRecording(ABC):
    """See the module. `_files` is made by whoever derives from it."""

    full: bool = False
    """Whether to wait for `room` before the next message."""

    def __init__(
        self,
        path: Path,
        *,
        flush_interval: float,
        flush_traps: int,
        on_error: Literal["stop", "continue"],
        message_index: bool,
        rotation: Rotation | None,
    ) -> None:
        self.path: Path = path
        """Of the file that is written, from when it is made."""
        self.lost: int = 0
        """Traps that are not in the recording: taken after the file could not be written any more,
        or, with "continue", while the volume was full. If the recorder was dropped, those of that
        VM are counted when the VM has ended."""
        self.error: RecordingError | None = None
        """Why the recording has ended before its time."""
        self.hindrance: Hindrance | None = None
        """Why what happens is not written right now; `None`: it is. See `Tap.hindrance`."""
        # Half a period fills up while the other half is being written.
        self._interval = flush_interval / 2
        self._cut_at = flush_traps // 2
        self._max_traps = flush_traps
        self._on_error = on_error
        self._files: RecordingParts
        self._rotation = rotation
        self._stops: dict[str, Callable[[Exception], None]] = {}
        """What ends the run of each VM."""
        self._first_chunk = partial(ChunkBuilder, message_index=message_index, describes=True)
        self._chunk = self._first_chunk()
        self._waiting: deque[ChunkBuilder] = deque()
        self._joins = False
        """Whether traps are put together with their replies."""
        self._is_gap = False
        """Whether what comes is given up until there is room."""
        self._lost_of: Counter[str] = Counter()
        """Of `lost`: by VM."""
        self._first_vm = ""
        """Whose traps those are of which no chunk says whose they are."""
        self._told: dict[str, int] = {}
        """What `unrecorded` has said of each VM."""
        self._lost_before = 0
        """`lost` when the volume became full."""
        self._full_since = 0.0
        self._is_last = False
        """Whether what is written now is tried once more, and not again."""
        self._unwritten = 0
        self._unwritten_traps = 0
        self._writing: anyio.CancelScope
        self._written_on = anyio.Event()
        """No chunk is written by `_write_on` any more."""
        self._is_finished = False
        self._wake: Parking | None = None
        self._room: anyio.Event | None = None

    async def _open(self, files: RecordingParts) -> None:
        """Make the first file, now or when there is room. Raises `RecordingError`."""
        self._files = files
        self._writing = anyio.CancelScope()
        try:
            await in_own_thread(files.open)
        except RecordingError as error:
            if not _is_for_room(error):
                raise
            self._be_hindered(error)
        self._tell_news()

    async def finish(self) -> None:
        """Write what is left and the index before the block is left, when every VM has ended: then
        `lost` and `lost_since` are what they stay. Shielded from cancellation; once more does
        nothing. Raises nothing for a file that cannot be written: the end of the block does."""
        if self._is_finished:
            return
        self._is_finished = True
        self._writing.cancel()
        with anyio.CancelScope(shield=True):
            await self._written_on.wait()
            await self._close()

    def lost_since(self, vm: str) -> int:
        """How many traps of a VM that has ended are missing beyond its `Summary.unrecorded`: those
        that waited for a volume with room, or were being written, when the recording ended."""
        return self._lost_of[vm] - self._told.get(vm, 0)

    async def _close(self) -> None:
        """Write what is left and the index, and say what is missing."""
        self._is_last = True
        await self._write_waiting()
        if self.error is None:
            try:
                await in_own_thread(self._files.finish)
            except OSError as lost:
                self._fail(lost)
        await in_own_thread(self._files.close)
        if self.error is None:
            traps = counted(self._files.traps, "trap was", "traps were")
            log.info("%s: %s recorded", self.path, traps)
        if self.lost or self.error is not None:
            traps = counted(self.lost, "trap was", "traps were")
            log.error("%s; %s not recorded", self.error or f"{self.path}: has a gap", traps)

    def finish_now(self) -> None:
        """Write what is collected, and the index: blocking, from any thread, for a process that
        ends behind this call while the loop does not turn. What it has no room for is left out."""
        self._is_last = True
        chunk, self._chunk = self._chunk, ChunkBuilder()
        if not self._takes_messages or not hasattr(self, "_files"):
            return
        try:
            left = [*self._waiting, *([chunk] if chunk.settle() else [])]
            self._files.finish_with([(each.part, each.pack()) for each in left])
        except Exception as error:
            log.error("%s: not finished: %s", self.path, _why(error))  # noqa: TRY400
        else:
            log.info("%s: finished, with all that was recorded", self._files.path)

    async def room(self) -> None:
        """Wait for the disk."""
        while self.full:
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    def _hold_guests(self) -> None:
        # One that is collected alone has less than half of what it may.
        self.full = (
            self._unwritten_traps + self._chunk.traps >= self._max_traps
            or self._unwritten >= MAX_UNWRITTEN
            or self.hindrance is not None
        ) and self._takes_messages

    @property
    def _takes_messages(self) -> bool:
        return self.error is None and not self._is_gap

    def _settle(self) -> None:
        """Encode what is held."""
        if self._chunk.settle() >= _CHUNK:
            self._cut()

    def _cut(self) -> None:
        """Hand what is collected to the writer."""
        chunk = self._chunk
        size = chunk.settle()
        if not size:
            return
        if size <= _SMALL:
            chunk.pack()
        self._waiting.append(chunk)
        self._unwritten += size
        self._unwritten_traps += chunk.traps
        self._chunk = chunk.next()
        if self._rotation is not None:
            self._rotation.cut(len(chunk))
        if self._wake is not None:
            self._wake.wake()

    async def _write_on(self) -> None:
        """Write chunks as they are cut, and what is left at each interval."""
        self._wake = parking()
        try:
            with self._writing:
                while True:
                    if self.hindrance is not None:
                        await anyio.sleep(_AGAIN)
                    elif not self._waiting:
                        await self._wake.wait_for(self._interval)
                    with anyio.CancelScope(shield=True):
                        await self._write_waiting()
        finally:
            self._written_on.set()

    async def _write_waiting(self) -> None:
        """Write all that is collected."""
        try:
            self._begin_round()
            self._cut()
        except Exception as unknown:  # a message that cannot be encoded, of a backend
            self._fail(unknown)
            return
        while self._waiting and self.error is None:
            chunk = self._waiting[0]
            try:
                size = await in_own_thread(self._write, chunk)
            except Exception as lost:
                if _is_for_room(lost) and not self._is_last:
                    self._be_hindered(lost)
                else:
                    self._fail(lost)
                return
            finally:
                self._tell_news()
            if self._waiting:  # else the recorder was dropped meanwhile
                self._waiting.popleft()
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
            self._lost_of.subtract(self._traps_by_vm(chunk))
        elif self.hindrance is not None:
            self._go_on()
        # A small chunk, or one without traps, makes too little room.
        if (
            self._unwritten_traps + self._chunk.traps < self._max_traps
            and self._unwritten < MAX_UNWRITTEN
        ):
            self._free()

    def _write(self, chunk: ChunkBuilder) -> int:
        return self._files.add(chunk.part, chunk.pack())

    # --- parts ----------------------------------------------------------------------------

    @abstractmethod
    def _add(self, channel: ChannelKind, message: Any, at: float | None = None) -> None:
        """Collect a message, of the time `at`, or now."""

    @abstractmethod
    def _flush_steps(self) -> None:
        """Add what is kept back until the next message."""

    def _split_if_due(self, data: int = 0) -> None:
        """Go on in another file, where this one has no room for a message with so much data, or
        has had its time."""
        rotation = self._rotation
        if (
            rotation is not None
            and self._takes_messages
            and rotation.is_due(self._chunk.settle(), data)
        ):
            self._split(rotation)

    def _split(self, rotation: Rotation) -> None:
        self._flush_steps()
        self._cut()
        self._begin_part(rotation)

    def _begin_part(self, rotation: Rotation, told: str = "") -> None:
        self._chunk = self._first_chunk(rotation.next_part())
        for channel, message in rotation.preamble():
            self._add(channel, message)
            if told and channel is SESSION:
                self._add(NOTE, Note("lost", told, message.vm))
        rotation.begun(self._chunk.settle())

    def _begin_round(self) -> None:
        """Before what is collected is written: whether it goes on in another part."""
        if self._rotation is None or not self._is_gap:
            self._split_if_due()
            return
        self._flush_steps()  # of what is given up
        self._is_gap = False
        traps = counted(self.lost - self._lost_before, "trap was", "traps were")
        self._begin_part(self._rotation, f"the volume was full: {traps} not recorded before this")

    # --- a volume that is full ------------------------------------------------------------

    def _be_hindered(self, error: Exception) -> None:
        if self.error is not None:
            return
        is_new = self.hindrance is None
        holds = self._on_error == "stop"
        why = f"{self.path}: {_why(error)}"
        self.hindrance = Hindrance("disk full", why, holds)
        if is_new:
            self._full_since = anyio.current_time()
            self._lost_before = self.lost
        if holds:
            self.full = True
            if is_new:
                log.error("%s: the guests are held until there is room", why)
            return
        self._is_gap = True
        self._give_up_unwritten()
        self._unwritten = self._unwritten_traps = 0
        if self._rotation is not None:
            self._rotation.go_back_to(self._files.part)
        self._free()
        if is_new:
            log.error("%s; the run continues without a recording, until there is room", why)

    def _go_on(self) -> None:
        """There is room again."""
        waited = f"there is room again, after {anyio.current_time() - self._full_since:.0f} s"
        self.hindrance = None
        if self._on_error == "stop":
            log.warning("%s: %s: nothing is missing, the guests go on", self.path, waited)
            return
        traps = counted(self.lost - self._lost_before, "trap was", "traps were")
        log.warning("%s: %s; %s not recorded", self.path, waited, traps)

    def _give_up_unwritten(self) -> None:
        """What is not written is lost, and counted."""
        for chunk in (*self._waiting, self._chunk):
            self.lost += chunk.traps
            self._lost_of.update(self._traps_by_vm(chunk))
        self._waiting.clear()
        self._chunk = ChunkBuilder()

    def _traps_by_vm(self, chunk: ChunkBuilder) -> Counter[str]:
        counts = Counter(chunk.traps_of)
        counts[self._first_vm] += chunk.traps - counts.total()
        return counts

    def _fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        why = str(error) if isinstance(error, RecordingError) else _why(error)
        self.error = RecordingError(f"{self.path}: the recording ends here: {why}")
        self.error.__cause__ = error
        self.hindrance = Hindrance("not recording", str(self.error), False)
        # With the chunk that is being written.
        self._give_up_unwritten()
        # What is not written any more is counted, trap by trap.
        self._joins = False
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


def _is_for_room(error: BaseException | None) -> bool:
    """Whether there was no room: of the file, or of the one that it was to go on in."""
    if isinstance(error, RecordingError):
        error = error.__cause__
    return isinstance(error, OSError) and error.errno in NO_ROOM


def _why(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RecordingError) else error
    text = cause.strerror if isinstance(cause, OSError) else None
    return text or one_line(error)
