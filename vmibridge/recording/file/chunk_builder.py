"""Messages put together into MCAP chunks.

The `mcap` package takes 2.8 us to add one message, and a trap has two or more, on the
loop that answers traps. So messages are framed here, straight from msgspec into one
buffer; all other records are left to the package. Messages may be held first, and encoded
together: one by one, between what the engine does, each takes nearly twice as long. Traps that are
answered before anything else is recorded go into one message for many (`PlainTraps`).
Layout: MCAP specification, sections "Message", "Message Index" and "Chunk".

Message indexes, one entry of 16 bytes a message, are half of a file of small traps, and no reader
needs them: an empty map of their offsets means that there are none (MCAP specification, "Chunk
Index"). So they are made where they are asked for. What a chunk has of sessions, and of notes that
are no retries, is indexed in any case, behind the chunk: a reader that leaves out a chunk by its
times has to know that it misses none of them.
"""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from threading import local
from typing import Any, Final, TypeAlias

import msgspec
import zstandard
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, Schema

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.recording.messages import (
    FILE_CHANNELS,
    NOTE,
    PLAIN,
    SESSION,
    TRAP,
    ChannelKind,
    json_schema,
)
from vmibridge.vm.trap import RegisterWrites, TrapEvent

_MESSAGE = struct.Struct("<BQHIQQ")
"""Opcode, length of what follows, channel, sequence, both times."""
_ROOM = bytes(_MESSAGE.size)
_INDEX = struct.Struct("<BQHI")
_SESSION, _TRAP, _PLAIN = SESSION.id, TRAP.id, PLAIN.id
_RARE = (SESSION, NOTE)
_NEVER = (1 << 64) - 1
"""Later than any message."""
_LEVEL = 1
"""Of zstd: three times as fast as 3 here, for files 1.2 times as large."""
_of_thread: Final = local()


def built(builder: RecordBuilder) -> bytes:
    """The records that were written to a builder; it is empty after that."""
    records: bytes = builder.end()  # type: ignore[no-untyped-call]
    return records


def write_schemas(builder: RecordBuilder, schema_of: Callable[[ChannelKind], bytes]) -> None:
    """Write the schema of each channel."""
    for channel in FILE_CHANNELS:
        name = f"vmibridge.{channel.topic}"
        Schema(channel.id, schema_of(channel), "jsonschema", name).write(builder)


def write_channels(builder: RecordBuilder) -> None:
    """Write what channels there are."""
    for channel in FILE_CHANNELS:
        Channel(channel.id, channel.topic, "msgpack", {}, channel.id).write(builder)


PlainTuple: TypeAlias = tuple[
    int,
    TrapEvent,
    int,
    OutcomeKind,
    RegisterWrites | None,
    str | None,
    str | None,
    str | None,
    float,
    str | None,
    BridgePacket | None,
]
"""The fields of a `PlainTrap`, which take a third of the time that the struct takes."""


def other_packet(outcome: Outcome[Any]) -> BridgePacket | None:
    """What an outcome says that was asked; `None`: that is what its trap says."""
    assert outcome.event is not None
    return None if outcome.packet == request_in(outcome.event) else outcome.packet


@cache
def description() -> bytes:
    """Schemas and channels, which stand in front of the first message of a file."""
    builder = RecordBuilder()
    write_schemas(builder, json_schema)
    write_channels(builder)
    return built(builder)


def _compressor() -> zstandard.ZstdCompressor:
    """That of this thread: to make one for each chunk takes half as long as to compress it."""
    try:
        found: zstandard.ZstdCompressor = _of_thread.compressor
    except AttributeError:
        found = _of_thread.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return found


class PackedChunk(msgspec.Struct, frozen=True):
    """A chunk and its message indexes, as they go into the file."""

    data: bytes
    chunk_length: int
    """Bytes of the chunk record alone; the indexes stand behind it."""
    index_offsets: dict[int, int]
    """From a channel to where its index is, counted from the start of `data`; empty without."""
    start_time: int
    end_time: int
    compressed_size: int
    uncompressed_size: int
    counts: dict[int, int]
    """Messages by channel."""
    describes: bool = False
    """Whether schemas and channels stand in it, in front of the messages."""
    traps: int = 0
    """How many it has, where whoever built it has counted them."""


class ChunkBuilder:
    """Collects messages; on the loop, so it does as little as it can."""

    __slots__ = (
        "_buffer",
        "_counts",
        "_describes",
        "_encode",
        "_end",
        "_indexes",
        "_is_indexed",
        "_packed",
        "_start",
        "held",
        "part",
        "plain",
        "taken",
        "taken_at",
        "traps",
        "traps_of",
    )

    def __init__(
        self, part: int = 1, *, message_index: bool = False, describes: bool = False
    ) -> None:
        """`describes`: schemas and channels come first, compressed: for the first of a file."""
        # Values that msgspec does not know, such as a handler's output, never get here.
        self._encode = msgspec.msgpack.Encoder().encode_into
        self._buffer = bytearray()
        self._counts: dict[int, int] = dict.fromkeys((channel.id for channel in FILE_CHANNELS), 0)
        self._start: int = _NEVER
        self._end: int = 0
        self._describes = describes
        self._is_indexed = message_index
        indexed = (channel.id for channel in (FILE_CHANNELS if message_index else _RARE))
        # By channel: time and place of each message, in turn.
        self._indexes: dict[int, list[int]] = {channel: [] for channel in indexed}
        self._packed: PackedChunk | None = None
        self.held: list[tuple[int, int, Any]] = []
        """Channel, time and message of what is to be encoded yet; whoever appends here calls
        `part_plain` before, and `settle` before long."""
        self.plain: list[PlainTuple] = []
        """Behind these."""
        self.taken: TrapEvent | None = None
        """Behind these: a trap that is plain if its reply is what comes next."""
        self.taken_at: int = 0
        """When it was taken, in nanoseconds since the Unix epoch."""
        self.traps: int = 0
        """How many traps it has; kept by the caller."""
        self.traps_of: dict[str, int] = {}
        """The same by VM, where the caller wants to know."""
        self.part: int = part
        """Of which file of the recording it is."""

    def __len__(self) -> int:
        """Bytes so far, without what is held."""
        return len(self._buffer)

    def add(self, channel: int, time: int, message: Any) -> int:
        """Add a message of one of the structs of a recording; returns how long this is then."""
        if self.plain or self.taken is not None:
            self.part_plain()
        self.held.append((channel, time, message))
        return self.settle()

    def part_plain(self) -> None:
        """Something else comes behind the plain traps, and behind the one that was taken."""
        if self.plain:
            self.held.append((_PLAIN, self.plain[-1][2], {"traps": self.plain}))
            self.plain = []
        if self.taken is not None:
            self.held.append((_TRAP, self.taken_at, self.taken))
            self.taken = None

    def next(self) -> "ChunkBuilder":
        """An empty one, for the same file."""
        return ChunkBuilder(self.part, message_index=self._is_indexed)

    def settle(self) -> int:
        """Encode what is held; returns how long this is then.

        Raises what msgspec raises for a message that it cannot encode; then this is of no use
        any more.
        """
        if self.plain or self.taken is not None:
            self.part_plain()
        held = self.held
        buffer, size = self._buffer, len(self._buffer)
        if not held:
            return size
        if self._describes and not size:
            buffer += description()
            size = len(buffer)
        encode, frame, counts, indexes = (
            self._encode,
            _MESSAGE.pack_into,
            self._counts,
            self._indexes,
        )
        for channel, time, message in held:
            start = size
            buffer += _ROOM
            encode(message, buffer, start + 31)
            size = len(buffer)
            # It was recorded with the last of them, and published with the first.
            first = time if channel != _PLAIN else message["traps"][0][0]
            frame(buffer, start, 5, size - start - 9, channel, 0, time, first)
            counts[channel] += 1
            if channel in indexes and (
                self._is_indexed or channel == _SESSION or message.kind != "retry"
            ):
                indexes[channel] += (time, start)
        times = [time for _, time, _ in held]
        self._start, self._end = min(self._start, *times), max(self._end, *times)
        held.clear()
        return size

    def pack(self) -> PackedChunk:
        """Compress it, once; in any thread. Nothing may be added after that.

        Raises `ValueError` when it is empty.
        """
        if self._packed is not None:
            return self._packed
        self.settle()
        if not self._buffer:
            raise ValueError("a chunk has at least one message")
        data = self._buffer
        compressed = _compressor().compress(data)
        builder = RecordBuilder()
        Chunk(
            compression="zstd",
            data=compressed,
            message_start_time=self._start,
            message_end_time=self._end,
            uncompressed_crc=zlib.crc32(data),
            uncompressed_size=len(data),
        ).write(builder)
        parts = [built(builder)]
        chunk_length = at = len(parts[0])
        offsets = {}
        for channel, entries in self._indexes.items():
            if not entries:
                continue
            body = struct.pack(f"<{len(entries)}Q", *entries)
            offsets[channel] = at
            parts += [_INDEX.pack(Opcode.MESSAGE_INDEX, len(body) + 6, channel, len(body)), body]
            at += _INDEX.size + len(body)
        self._packed = PackedChunk(
            b"".join(parts),
            chunk_length,
            # Where some channels are named, readers take it that the chunk has no others.
            offsets if self._is_indexed else {},
            self._start,
            self._end,
            len(compressed),
            len(data),
            {channel: count for channel, count in self._counts.items() if count},
            self._describes,
            self.traps,
        )
        return self._packed
