"""The file of a recorder: chunks that are collected on the loop and written in a thread.

A chunk is *collected* until it is full, or its time is up; it is *cut* then, and waits for those
before it to be written. What is collected and what waits together is bounded: beyond the bound
the recorder is `full`, and who records waits for `room`.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import anyio

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.bridge.dispatch import one_line
from vmibridge.errors import RecordingError
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.parts import RecordingParts
from vmibridge.recording.rotation import Rotation

__all__ = ["MAX_UNWRITTEN", "ChunkedRecording"]

log: logging.Logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""
MAX_UNWRITTEN = 32 << 20
"""The same, of all that is not written yet: then the guests wait."""
_SMALL = 256 << 10
"""Bytes of a chunk that the loop compresses: about 300 us."""


class ChunkedRecording:
    """See the module. `_files` is opened by whoever derives from it."""

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
        """Traps that were taken after the file could not be written any more. If the recorder was
        dropped, those of that VM are counted when the VM has ended."""
        self.error: RecordingError | None = None
        """Why it could not be written."""
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
        self._unwritten = 0
        self._unwritten_traps = 0
        self._wake: anyio.Event | None = None
        self._room: anyio.Event | None = None

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
        ) and self.error is None

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
        try:
            self._cut()
        except Exception as unknown:  # a message that cannot be encoded, of a backend
            self._fail(unknown)
            return
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
            and self._unwritten < MAX_UNWRITTEN
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
