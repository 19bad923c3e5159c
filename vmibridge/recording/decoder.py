"""Decodes the messages of a recording for the reader of the `mcap` package.

    with open("run.mcap", "rb") as file:
        reader = mcap.reader.make_reader(file, decoder_factories=[DecoderFactory()])
        for decoded in reader.iter_decoded_messages(topics=["reply"]):
            print(decoded.channel.topic, decoded.decoded_message.kind)

The session of a VM says which registers its traps have. So it is decoded before them: a selection
of topics that has `trap` also has `session`, if the VM is not an x86.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mcap.decoder
import msgspec
from mcap.records import Schema

from vmibridge.errors import RecordingReadError, UnknownArchitectureError
from vmibridge.recording.messages import (
    CHANNELS,
    FORMATS,
    TRAP,
    RecordedMessage,
    Session,
    architecture_of,
    trap_type,
)
from vmibridge.vm.trap import Registers, TrapEvent

__all__ = ["DecoderFactory"]

_KINDS = {f"vmibridge.{channel.topic}": channel.kind for channel in CHANNELS}
_X86 = frozenset(Registers.__struct_fields__)
_MAX_VMS = 65_536


class _Head(msgspec.Struct):
    """What says how to decode a trap."""

    registers: dict[str, msgspec.Raw]
    vm: str = "vm"


_head = msgspec.msgpack.Decoder(_Head).decode


class DecoderFactory(mcap.decoder.DecoderFactory):
    """Decodes each message to the struct of its channel, as `RecordingReader` does.

    One for each pass over a file: it keeps which VM has which architecture. A decoder raises
    `RecordingReadError` for a message that cannot be decoded, and for one of a format or an
    architecture that is not known.
    """

    def __init__(self) -> None:
        self._traps: dict[str, type[TrapEvent]] = {}

    def decoder_for(
        self, message_encoding: str, schema: Schema | None
    ) -> Callable[[bytes], RecordedMessage] | None:
        """The decoder of a channel; `None` for one that is not of a recording."""
        kind = None if schema is None else _KINDS.get(schema.name)
        if kind is None or message_encoding != "msgpack":
            return None
        if kind is TRAP.kind:
            return self._decode_trap
        decode = msgspec.msgpack.Decoder(kind).decode

        def decode_message(data: bytes) -> RecordedMessage:
            message: RecordedMessage = _checked(decode, data)
            if isinstance(message, Session):
                self._begin(message)
            return message

        return decode_message

    def _begin(self, session: Session) -> None:
        if session.format not in FORMATS:
            raise RecordingReadError(f"the recording has format {session.format}, not known here")
        try:
            kind = trap_type(architecture_of(session))
        except UnknownArchitectureError as error:
            raise RecordingReadError(str(error)) from error
        if session.vm in self._traps or len(self._traps) < _MAX_VMS:
            self._traps[session.vm] = kind

    def _decode_trap(self, data: bytes) -> TrapEvent:
        head: _Head = _checked(_head, data)
        kind = self._traps.get(head.vm)
        if kind is None:
            if not _X86.issuperset(head.registers):
                raise RecordingReadError(
                    f"the registers of a trap are not those of x86, and no session of its VM"
                    f" {head.vm[:40]!r} was decoded before it; read the topic session, too"
                )
            kind = TrapEvent
        event: TrapEvent = _checked(_decoder_of(kind), data)
        return event


@cache
def _decoder_of(kind: type[TrapEvent]) -> Callable[[bytes], Any]:
    return msgspec.msgpack.Decoder(kind).decode


def _checked(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RecordingReadError(f"a message cannot be decoded: {error}") from error
