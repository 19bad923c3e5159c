"""The records of a chunk, unpacked: the bounds of `reader`, and no more bytes than it states."""

import struct
import zlib

import lz4.frame  # type: ignore[import-untyped]
import zstandard

MAX_CHUNK = 32 << 20
"""Bytes of a chunk, unpacked."""
MAX_RECORD = MAX_CHUNK + (1 << 20)
"""Bytes of a record in the file."""
FRAME = struct.Struct("<BQ")
"""What a record begins with: its opcode, and the length of what follows."""
CHUNK = struct.Struct("<QQQI")
"""What a chunk begins with: its first and last time, its size, its CRC."""


def unpack(body: bytes) -> bytes:
    """The records of a chunk. Raises `ValueError`, which says what is wrong with it."""
    if len(body) < CHUNK.size:
        raise ValueError("it is too short")
    _, _, size, crc = CHUNK.unpack_from(body)
    compression, at = text(body, CHUNK.size)
    if len(body) < at + 8:
        raise ValueError("it is too short")
    (length,) = struct.unpack_from("<Q", body, at)
    at += 8
    if length != len(body) - at:
        raise ValueError("its lengths do not fit together")
    if size > MAX_CHUNK:
        raise ValueError(f"it would unpack to {size} bytes, {MAX_CHUNK} is the most")
    packed = memoryview(body)[at:]
    if compression == "zstd":
        data = _from_zstd(packed, size)
    elif compression == "lz4":
        data = _from_lz4(packed, size)
    elif compression == "":
        data = bytes(packed)
    else:
        raise ValueError(f"its compression is {compression[:20]!r}, and zstd and lz4 are read")
    if len(data) != size:
        raise ValueError(f"it has {len(data)} bytes and states {size}")
    if crc and zlib.crc32(data) != crc:
        raise ValueError("its CRC is wrong")
    return data


def lengths_agree(body: bytes) -> bool:
    """Whether what a chunk says of its data leads to where the record ends."""
    try:
        _, at = text(body, CHUNK.size)
        (length,) = struct.unpack_from("<Q", body, at)
    except (ValueError, struct.error):
        return False
    ends: bool = at + 8 + length == len(body)
    return ends


def _from_zstd(packed: memoryview, size: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(packed)
        # A frame that states its size is given room for it: that has to be the size above.
        if frame.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise ValueError(f"it unpacks to {frame.content_size} bytes and states {size}")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be unpacked: {error}") from None


def _from_lz4(packed: memoryview, size: int) -> bytes:
    unpacker = lz4.frame.LZ4FrameDecompressor()
    try:
        data: bytes = unpacker.decompress(packed, max_length=max(size, 1))
    except RuntimeError as error:
        why = f"its compression is 'lz4', and it cannot be unpacked: {error}"
        raise ValueError(why) from None
    if not unpacker.eof:
        raise ValueError(f"it does not end after the {size} bytes that it states")
    return data


def text(body: bytes, at: int) -> tuple[str, int]:
    """Text with its length in front, and where it ends. Raises `ValueError`."""
    if len(body) < at + 4:
        raise ValueError("it is too short")
    (length,) = struct.unpack_from("<I", body, at)
    if length > min(len(body) - at - 4, 1 << 16):
        raise ValueError("a text in it is longer than it is")
    return body[at + 4 : at + 4 + length].decode(), at + 4 + length
