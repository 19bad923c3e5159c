"""Packets of GDB's remote protocol: framing only, no I/O.

GDB manual, appendix E.1 (overview): a packet is `$data#xx` with the sum of the bytes between
as two hex digits; `}` escapes the byte behind it, which is XORed with 0x20; `*` repeats the
byte before it as often as the byte behind it says, less 29. A notification has `%` for `$`.
`+` and `-` between packets acknowledge, or ask for the last packet again.
"""

import re
from enum import Enum
from zlib import adler32

MAX_PACKET = 1 << 20
"""Bytes of one packet, as it comes and unpacked: the most that is taken of any stub."""

_START, _END, _ESCAPE, _REPEAT, _NOTIFICATION, _ACK, _NACK = b"$#}*%+-"
_SPECIAL = re.compile(rb"[$#}*]")
_REPEAT_BASE = 29


class PacketError(ValueError):
    """Bytes that are no packet. What comes behind them cannot be relied on either."""


class Mark(Enum):
    """What comes between packets, and says something."""

    NACK = "-"
    """The last packet was not understood, and is wanted again."""


class Notification(bytes):
    """The data of a packet that is neither a reply nor acknowledged."""

    __slots__ = ()


def encode(data: bytes) -> bytes:
    """The packet that carries `data`."""
    if _SPECIAL.search(data):
        data = _SPECIAL.sub(lambda found: bytes((_ESCAPE, found[0][0] ^ 0x20)), data)
    return b"$%b#%02x" % (data, checksum(data))


def checksum(data: bytes) -> int:
    """The sum of all bytes, modulo 256."""
    # Adler-32's lower half is 1 + the sum modulo 65521, which 257 bytes do not reach.
    total = 0
    for at in range(0, len(data), 256):
        total += (adler32(data[at : at + 256]) & 0xFFFF) - 1
    return total & 0xFF


class PacketReader:
    """Puts packets together out of pieces of any size."""

    def __init__(self, most: int = MAX_PACKET) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self._max_size = most

    def feed(self, data: bytes) -> None:
        """More bytes have come."""
        self._buffer += data

    @property
    def is_within_a_packet(self) -> bool:
        """Whether a part of a packet is there, and the rest is not."""
        return bool(self._buffer)

    def next(self) -> bytes | Notification | Mark | None:
        """The data of the next packet, or a mark; `None`: it has not all come yet.

        Raises `PacketError` for what is none, has a wrong checksum, or is too long.
        """
        buffer = self._buffer
        while buffer and buffer[0] == _ACK:
            del buffer[0]
        if not buffer:
            return None
        first = buffer[0]
        if first == _NACK:
            del buffer[0]
            return Mark.NACK
        if first not in (_START, _NOTIFICATION):
            raise PacketError(f"byte {first:#04x} between packets")
        end = buffer.find(_END, self._searched or 1)
        if end < 0:
            if len(buffer) > self._max_size:
                raise PacketError(f"a packet of more than {self._max_size} bytes")
            self._searched = len(buffer)
            return None
        if end > self._max_size:
            raise PacketError(f"a packet of {end} bytes, {self._max_size} are the most")
        if len(buffer) < end + 3:
            self._searched = end
            return None
        raw, stated = bytes(buffer[1:end]), bytes(buffer[end + 1 : end + 3])
        del buffer[: end + 3]
        self._searched = 0
        check_sum(raw, stated)
        data = unpack(raw, self._max_size)
        return Notification(data) if first == _NOTIFICATION else data


def check_sum(raw: bytes, stated: bytes) -> None:
    """Raises `PacketError` unless `stated`, two hex digits, is the sum of `raw`."""
    if stated.lower() != b"%02x" % checksum(raw):
        raise PacketError(f"a wrong checksum: {stated!r} of {len(raw)} bytes")


def unpack(raw: bytes, most: int = MAX_PACKET) -> bytes:
    """Data without escapes and repeats. Raises `PacketError`, also for more than `most` bytes."""
    if _ESCAPE not in raw and _REPEAT not in raw:
        return raw
    data = bytearray()
    rest = iter(raw)
    for byte in rest:
        if byte not in (_ESCAPE, _REPEAT):
            data.append(byte)
            continue
        argument = next(rest, None)
        if argument is None:
            raise PacketError("a packet that ends in an escape")
        if byte == _ESCAPE:
            data.append(argument ^ 0x20)
            continue
        count = argument - _REPEAT_BASE
        if not data or not 3 <= count <= 126 - _REPEAT_BASE:
            raise PacketError(f"a repeat by {argument:#04x}")
        data += data[-1:] * count
        if len(data) > most:
            break
    if len(data) > most:
        raise PacketError(f"a packet of more than {most} bytes, unpacked")
    return bytes(data)
