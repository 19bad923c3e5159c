"""Messages put together into MCAP chunks.

The `mcap` package takes 2.8 us to add one message, and a trap has two or more, on the
loop that answers traps. So messages are framed here, straight from msgspec into one
buffer; compression, and all other records, are left to a thread and to the package.
Layout: MCAP specification, sections "Message", "Message Index" and "Chunk".
"""

import struct
import zlib
from typing import Any

import msgspec
import zstandard
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import Chunk

from vmibridge.recording.messages import CHANNELS

_MESSAGE = struct.Struct("<BQHIQQ")
_FRAME = 9
"""Bytes of an opcode and a length."""
_ROOM = bytes(_MESSAGE.size)
_INDEX = struct.Struct("<BQHI")
_LEVEL = 1
"""Of zstd: three times as fast as 3 here, for files 1.2 times as large."""


def built(builder: RecordBuilder) -> bytes:
    """The records that were written to a builder; it is empty after that."""
    records: bytes = builder.end()  # type: ignore[no-untyped-call]
    return records


class PackedChunk(msgspec.Struct, frozen=True):
    """A chunk and its message indexes, as they go into the file."""

    data: bytes
    chunk_length: int
    """Bytes of the chunk record alone; the indexes stand behind it."""
    index_offsets: dict[int, int]
    """From a channel to where its index is, counted from the start of `data`."""
    start_time: int
    end_time: int
    compressed_size: int
    uncompressed_size: int
    counts: dict[int, int]
    """Messages by channel."""


class ChunkBuilder:
    """Collects messages; on the loop, so it does as little as it can."""

    __slots__ = ("_buffer", "_encode", "_indexes", "part", "traps")

    def __init__(self, part: int = 1) -> None:
        # Values that msgspec does not know, such as a handler's output, never get here.
        self._encode = msgspec.msgpack.Encoder().encode_into
        self._buffer = bytearray()
        # By channel: time and place of each message, in turn.
        self._indexes: dict[int, list[int]] = {channel.id: [] for channel in CHANNELS}
        self.traps: int = 0
        """How many of them are traps; kept by the caller."""
        self.part: int = part
        """Of which file of the recording it is."""

    def __len__(self) -> int:
        """Bytes so far."""
        return len(self._buffer)

    def add(self, channel: int, time: int, message: Any) -> int:
        """Add a message of one of the structs of a recording; returns how long this is then."""
        buffer = self._buffer
        start = len(buffer)
        buffer += _ROOM
        self._encode(message, buffer, start + 31)
        size = len(buffer)
        _MESSAGE.pack_into(buffer, start, 5, size - start - 9, channel, 0, time, time)
        self._indexes[channel] += (time, start)
        return size

    def pack(self) -> PackedChunk:
        """Compress it; in a thread. Raises `ValueError` when it is empty."""
        if not self._buffer:
            raise ValueError("a chunk has at least one message")
        filled = {channel: entries for channel, entries in self._indexes.items() if entries}
        start_time = min(min(entries[::2]) for entries in filled.values())
        end_time = max(max(entries[::2]) for entries in filled.values())
        data = bytes(self._buffer)
        compressed = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        builder = RecordBuilder()
        Chunk(
            compression="zstd",
            data=compressed,
            message_start_time=start_time,
            message_end_time=end_time,
            uncompressed_crc=zlib.crc32(data),
            uncompressed_size=len(data),
        ).write(builder)
        parts = [built(builder)]
        chunk_length = at = len(parts[0])
        offsets, counts = {}, {}
        for channel, entries in filled.items():
            body = struct.pack(f"<{len(entries)}Q", *entries)
            offsets[channel] = at
            counts[channel] = len(entries) // 2
            parts += [_INDEX.pack(Opcode.MESSAGE_INDEX, len(body) + 6, channel, len(body)), body]
            at += _INDEX.size + len(body)
        return PackedChunk(
            b"".join(parts),
            chunk_length,
            offsets,
            start_time,
            end_time,
            len(compressed),
            len(data),
            counts,
        )
