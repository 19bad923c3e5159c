"""What is in a message on NATS: frames as on a connection, and two that only NATS needs.

A message has whole frames, one behind the other. One that is larger than NATS takes goes in
parts: a size that no frame has, then the id of the whole, the number of the part, and how
many there are. The parts of one sender come in order or not at all.

Plain functions and a small state machine: no I/O.
"""

import itertools
import struct
from collections.abc import Iterator
from typing import Annotated, Final, Generic, TypeAlias

import msgspec

from vmibridge.errors import WireError
from vmibridge.text import fault_of
from vmibridge.transport.wire import HELLO_LIMIT, MEMORY_LIMIT, F, Frame, FromAgent, FromServer

_PART = struct.Struct("<IIHH")
"""The mark, the id of the whole, the number of this part, and of how many."""
_MARK = 0xFFFF_FFFF
_MAX_PARTS = 0xFFFF
_SIZE = struct.Struct("<I")

_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_U64 = Annotated[int, msgspec.Meta(ge=0)]


class Ask(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=32):
    """From the agent: which server handles this trap? Say so, or answer it again."""

    seq: _U64
    vcpu: _U16


class Taken(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=48):
    """From a server: it is at this trap."""

    seq: _U64


NatsFromAgent: TypeAlias = FromAgent | Ask
NatsFromServer: TypeAlias = FromServer | Taken
NatsFrame: TypeAlias = Frame | Ask | Taken

FROM_NATS_AGENT: Final = msgspec.msgpack.Decoder(NatsFromAgent)
FROM_NATS_SERVER: Final = msgspec.msgpack.Decoder(NatsFromServer)

_encode = msgspec.msgpack.Encoder().encode
_numbers = itertools.count(1)


def pack(*frames: NatsFrame) -> bytes:
    """A message of these frames."""
    parts: list[bytes] = []
    for frame in frames:
        body = _encode(frame)
        parts += (_SIZE.pack(len(body)), body)
    return b"".join(parts)


def parts_of(message: bytes, most: int) -> Iterator[bytes]:
    """What to publish for it: itself, or parts of `most` bytes at the most.

    Raises `ValueError` when NATS takes too little for that.
    """
    if len(message) <= most:
        yield message
        return
    room = most - _PART.size
    if room < 1 or len(message) > room * _MAX_PARTS:
        raise ValueError(f"NATS takes messages of {most} bytes: too little for {len(message)}")
    count = -(-len(message) // room)
    whole = next(_numbers) & 0xFFFF_FFFF
    for number in range(count):
        data = message[number * room : (number + 1) * room]
        yield _PART.pack(_MARK, whole, number, count) + data


def hello_in(message: bytes) -> tuple[bytes, bytes]:
    """The bytes of the first frame, and the rest. Raises `WireError` when there is none."""
    if len(message) >= 4:
        size = _SIZE.unpack_from(message)[0]
        if size <= HELLO_LIMIT and len(message) >= 4 + size:
            return message[: 4 + size], message[4 + size :]
    raise WireError("no HELLO")


class Messages(Generic[F]):
    """Takes the frames out of the messages of one peer."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[F]", limit: int = MEMORY_LIMIT) -> None:
        self._decoder = decoder
        self._limit = limit
        self._whole = self._next = self._count = 0
        self._partial = bytearray()

    def frames(self, message: bytes) -> list[F]:
        """The frames of a message; none, while parts are missing. Raises `WireError`."""
        if len(message) >= _PART.size and _SIZE.unpack_from(message)[0] == _MARK:
            whole = self._with_part(message)
            if whole is None:
                return []
            message = whole
        frames: list[F] = []
        at, end = 0, len(message)
        try:
            while at < end:
                following = at + 4 + _SIZE.unpack_from(message, at)[0]
                if following > end:
                    raise WireError("a frame without its end")
                frames.append(self._decoder.decode(message[at + 4 : following]))
                at = following
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, struct.error) as error:
            raise WireError(f"a frame that is none: {fault_of(error)}") from error
        return frames

    def _with_part(self, message: bytes) -> bytes | None:
        _, whole, number, count = _PART.unpack_from(message)
        if number == 0:
            self._whole, self._next, self._count = whole, 0, count
            self._partial.clear()
        elif (whole, number, count) != (self._whole, self._next, self._count):
            # Parts before it were lost, and the whole with them.
            self._partial.clear()
            self._whole = self._next = self._count = 0
            return None
        if len(self._partial) + len(message) > self._limit + _PART.size + 4:
            self._partial.clear()
            self._count = 0
            raise WireError("parts of more than a frame")
        self._partial += message[_PART.size :]
        self._next += 1
        if self._next < self._count:
            return None
        done = bytes(self._partial)
        self._partial.clear()
        self._count = 0
        return done
