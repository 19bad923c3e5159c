"""Decodes the messages of a recording for the reader of the `mcap` package.

    with open("run.mcap", "rb") as file:
        reader = mcap.reader.make_reader(file, decoder_factories=[DecoderFactory()])
        for decoded in reader.iter_decoded_messages(topics=["note"]):
            print(decoded.channel.topic, decoded.decoded_message.text)

Traps that were answered at once are in the topic `plain`, together with their replies
(`messages.PlainTraps`). The session of a VM says which registers its traps have. So it is decoded
before them: a selection of topics that has `trap` or `plain` also has `session`, if the VM is not
an x86.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import mcap.decoder
import msgspec
from mcap.records import Schema

from vmibridge.errors import RecordingReadError, UnknownArchitectureError
from vmibridge.recording.messages import (
    FILE_CHANNELS,
    FORMATS,
    MAX_PLAIN,
    PLAIN,
    TRAP,
    PlainTrap,
    PlainTraps,
    RecordedMessage,
    Session,
    architecture_of,
    plain_type,
    trap_type,
)
from vmibridge.text import fault_of
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import Registers, TrapEvent

__all__ = ["DecoderFactory"]

_KINDS = {f"vmibridge.{channel.topic}": channel.kind for channel in FILE_CHANNELS}
_X86 = frozenset(Registers.__struct_fields__)
_MAX_VMS = 65_536


class _Head(msgspec.Struct):
    """What says how to decode a trap."""

    registers: dict[str, msgspec.Raw]
    vm: str = "vm"


class _HeadOfPlain(msgspec.Struct, array_like=True):
    time: int
    event: _Head


class _Undecoded(msgspec.Struct):
    traps: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_PLAIN)]


_head = msgspec.msgpack.Decoder(_Head).decode
_head_of_plain = msgspec.msgpack.Decoder(_HeadOfPlain).decode
_undecoded = msgspec.msgpack.Decoder(_Undecoded).decode


class DecoderFactory(mcap.decoder.DecoderFactory):
    """Decodes each message to the struct of its channel.

    One for each pass over a file: it keeps which VM has which architecture. A decoder raises
    `RecordingReadError` for a message that cannot be decoded, and for one of a format or an
    architecture that is not known.
    """

    def __init__(self) -> None:
        self._architectures: dict[str, Architecture[Any]] = {}

    def decoder_for(
        self, message_encoding: str, schema: Schema | None
    ) -> Callable[[bytes], RecordedMessage | PlainTraps] | None:
        """The decoder of a channel; `None` for one that is not of a recording."""
        kind = None if schema is None else _KINDS.get(schema.name)
        if kind is None or message_encoding != "msgpack":
            return None
        if kind is TRAP.kind:
            return self._decode_trap
        if kind is PLAIN.kind:
            return self._decode_plain
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
            architecture = architecture_of(session)
        except UnknownArchitectureError as error:
            raise RecordingReadError(str(error)) from error
        if session.vm in self._architectures or len(self._architectures) < _MAX_VMS:
            self._architectures[session.vm] = architecture

    def _decode_trap(self, data: bytes) -> TrapEvent:
        architecture = self._architecture(_checked(_head, data))
        event: TrapEvent = _checked(_decoder_of(trap_type(architecture)), data)
        return event

    def _decode_plain(self, data: bytes) -> PlainTraps:
        traps: list[PlainTrap] = []
        for raw in _checked(_undecoded, data).traps:
            architecture = self._architecture(_checked(_head_of_plain, raw).event)
            traps.append(_checked(_decoder_of(plain_type(architecture)), raw))
        return PlainTraps(traps)

    def _architecture(self, head: _Head) -> Architecture[Any]:
        architecture = self._architectures.get(head.vm)
        if architecture is None:
            if not _X86.issuperset(head.registers):
                raise RecordingReadError(
                    f"the registers of a trap are not those of x86, and no session of its VM"
                    f" {head.vm[:40]!r} was decoded before it; read the topic session, too"
                )
            return X86
        return architecture


@cache
def _decoder_of(kind: type[Any]) -> Callable[[bytes], Any]:
    return msgspec.msgpack.Decoder(kind).decode


def _checked(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RecordingReadError(f"a message cannot be decoded: {fault_of(error)}") from error
