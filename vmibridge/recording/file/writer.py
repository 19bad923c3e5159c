"""A recording on disk: an MCAP file that is whole at any moment but for its last chunk.

Blocking, for a thread. A chunk goes to the file by itself, so what a killed process leaves
behind is a prefix of the file with at most one chunk cut short. A chunk that cannot be
written (the disk is full) is taken back: the file then ends with the chunk before it.
"""

import os
import struct
import zlib
from pathlib import Path

from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import (
    ChunkIndex,
    DataEnd,
    Footer,
    Header,
    Statistics,
    SummaryOffset,
)
from mcap.writer import MCAP0_MAGIC

from vmibridge.errors import RecordingError
from vmibridge.files import reason
from vmibridge.recording.file.chunk_builder import (
    PackedChunk,
    built,
    write_channels,
    write_schemas,
)
from vmibridge.recording.file.folder import lock, open_numbered, unlock
from vmibridge.recording.messages import FILE_CHANNELS, json_schema

PROFILE = "vmibridge"
_FOOTER = struct.Struct("<BQQQ")


class RecordingWriter:
    """Writes one file. Its calls raise `OSError`; not for several threads at a time."""

    def __init__(
        self,
        path: Path,
        library: str,
        *,
        stem: str = "run",
        suffix: str = ".mcap",
        after: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Make the file; in a folder, one that is not there yet: `run-1.mcap`, `run-2.mcap`, ...

        Its number is above `after`, or above those that are there. It is locked (`folder`) until
        it is closed. Raises `RecordingError` when it already exists, or cannot be made.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if overwrite else os.O_EXCL)
        try:
            if path.is_dir():
                path, self._fd = open_numbered(path, stem, suffix, after)
            else:
                self._fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise RecordingError(
                f"{path}: already exists, and a recording is not written over;"
                " move it away or name another file"
            ) from None
        except OSError as error:
            raise RecordingError(f"{path}: {reason(error, path)}") from error
        self.path = path
        self._at = 0
        """Bytes of the file that are whole."""
        # Before the first byte: a file with a header and without a lock is closed.
        lock(self._fd)
        self._chunks: list[ChunkIndex] = []
        self.counts: dict[int, int] = {}
        """Messages in the file, by channel."""
        self.traps: int = 0
        """Traps of chunks that say how many they have."""
        builder = RecordBuilder()
        builder.write(MCAP0_MAGIC)
        Header(PROFILE, library).write(builder)
        try:
            self._write(built(builder))
        except OSError as error:
            self.close()
            if not overwrite:
                # One of nothing would be in the way; what was there before may be a device.
                path.unlink(missing_ok=True)
            raise RecordingError(f"{path}: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Bytes of the file so far; its index comes on top."""
        return self._at

    def add(self, chunk: PackedChunk) -> None:
        """Append a chunk, whole or, with `OSError`, not at all."""
        front = RecordBuilder()
        if not self._chunks and not chunk.describes:
            write_schemas(front, json_schema)
            write_channels(front)
        self._write(built(front) + chunk.data)
        start = self._at - len(chunk.data)
        self._chunks.append(
            ChunkIndex(
                message_start_time=chunk.start_time,
                message_end_time=chunk.end_time,
                chunk_start_offset=start,
                chunk_length=chunk.chunk_length,
                message_index_offsets={
                    channel: start + offset for channel, offset in chunk.index_offsets.items()
                },
                message_index_length=len(chunk.data) - chunk.chunk_length,
                compression="zstd",
                compressed_size=chunk.compressed_size,
                uncompressed_size=chunk.uncompressed_size,
            )
        )
        self.traps += chunk.traps
        for channel, count in chunk.counts.items():
            self.counts[channel] = self.counts.get(channel, 0) + count

    def finish(self) -> None:
        """Write the index and close the file. On `OSError` it stays open, as it was: call again
        when there is room, or close it without an index."""
        self._write(self._summary())
        self.close()

    def close(self) -> None:
        """Close the file as it is; once more does nothing."""
        if self._fd >= 0:
            unlock(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            os.ftruncate(self._fd, self._at)
            os.lseek(self._fd, self._at, os.SEEK_SET)
            raise
        self._at += len(data)

    def _summary(self) -> bytes:
        end = RecordBuilder()
        DataEnd(0).write(end)
        data_end = built(end)
        summary_start = self._at + len(data_end)
        builder = RecordBuilder()
        groups = []
        start = builder.count
        write_schemas(builder, json_schema)
        groups.append((Opcode.SCHEMA, start, builder.count - start))
        start = builder.count
        write_channels(builder)
        groups.append((Opcode.CHANNEL, start, builder.count - start))
        start = builder.count
        Statistics(
            attachment_count=0,
            channel_count=len(FILE_CHANNELS),
            channel_message_counts=self.counts,
            chunk_count=len(self._chunks),
            message_count=sum(self.counts.values()),
            metadata_count=0,
            message_start_time=min((each.message_start_time for each in self._chunks), default=0),
            message_end_time=max((each.message_end_time for each in self._chunks), default=0),
            schema_count=len(FILE_CHANNELS),
        ).write(builder)
        groups.append((Opcode.STATISTICS, start, builder.count - start))
        start = builder.count
        for index in self._chunks:
            index.write(builder)
        if self._chunks:
            groups.append((Opcode.CHUNK_INDEX, start, builder.count - start))
        offsets_start = summary_start + builder.count
        for opcode, start, length in groups:
            SummaryOffset(opcode, summary_start + start, length).write(builder)
        summary = built(builder)
        footer = _FOOTER.pack(Opcode.FOOTER, 20, summary_start, offsets_start)
        crc = zlib.crc32(footer, zlib.crc32(summary))
        Footer(summary_start, offsets_start, crc).write(builder)
        return data_end + summary + built(builder) + MCAP0_MAGIC
