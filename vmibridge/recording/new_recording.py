"""A recording that is written message by message: synthetic, imported, edited or recovered.

    with NewRecording("made.mcap") as recording:
        recording.add(Session("vm"))
        recording.add_request(BridgePacket(MAGIC, 1, 2), BridgeResponse(value1=7))

Invariants:

- What is written can be read: a message has the types and the widths of its struct, its session is
  of a format and an architecture that are known, and it is no larger than a reader takes.
- The file has its name when it is whole. It never takes the place of another one.
- One chunk is held, however many messages there are. Blocking.
"""

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from time import time_ns
from typing import Any, Final, Self

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import form_of, write_response
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import RecordingError, UnknownArchitectureError
from vmibridge.recording.export import new_files
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.reader import MAX_MESSAGE
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import (
    CHANNELS,
    FORMATS,
    TRAP,
    ChannelKind,
    MemoryAccess,
    RecordedMessage,
    Reply,
    Session,
    architecture_of,
    output_text,
    trap_type,
)
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import TrapEvent, TrapReason

__all__ = ["NewRecording", "channel_of", "registers_for"]

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""
_MAX_TIME = (1 << 64) - 1
_CHANNEL_OF: Final[dict[type, ChannelKind]] = {channel.kind: channel for channel in CHANNELS}
_encode = msgspec.msgpack.Encoder().encode


def channel_of(message: RecordedMessage) -> ChannelKind:
    """The channel that a message goes to. Raises `TypeError` for what is no message."""
    found = _CHANNEL_OF.get(type(message))
    if found is None:
        if not isinstance(message, TrapEvent):
            raise TypeError(f"{type(message).__name__} is not a message of a recording")
        # One with the registers of another architecture.
        return TRAP
    return found


class _AbandonedError(Exception):
    """Leaves the block of the new file without giving it its name."""


class NewRecording:
    """A new file. `with` it: the file gets its name at the end of the block, unless that raises.

    Entering raises `ConfigError` for a file that is there already; entering, adding and leaving
    raise `RecordingError` when it cannot be written.
    """

    def __init__(
        self, path: Path | str, *, made_by: str = "vmibridge.recording", chunk_size: int = _CHUNK
    ) -> None:
        """`made_by` is what the file says of its origin.

        `chunk_size` is in bytes before compression: the chunk that reaches it is written.
        """
        self.path: Path = Path(path)
        self.counts: dict[str, int] = dict.fromkeys((each.topic for each in CHANNELS), 0)
        """Messages so far, by channel."""
        self._library = f"{made_by}, vmibridge {version('vmibridge')}"
        self._chunk_size = chunk_size
        self._chunk = ChunkBuilder()
        self._last = 0
        self._architectures: dict[str, Architecture[Any]] = {}
        self._seqs: dict[str, int] = {}
        self._stack = ExitStack()
        self._writer: RecordingWriter | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            (path,) = stack.enter_context(new_files([self.path]))
            self._writer = RecordingWriter(path, self._library, overwrite=True)
            stack.callback(self._writer.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            with suppress(_AbandonedError), self._stack:
                if error is not None:
                    # The files go. Not `error` itself, which may be of something else.
                    raise _AbandonedError
                self._cut()
                self._open_writer().finish()
        finally:
            self._writer = None

    def add(self, message: RecordedMessage, time: int | None = None) -> None:
        """Append a message. `time` is in nanoseconds since the Unix epoch; by default it is now,
        and at least that of the message before.

        Raises `TypeError` and `ValueError` for what a reader would not take: no message, a field
        of another type or width, a session of another format, registers of another architecture
        than the VM has, a message above 30 MiB.
        """
        self._check(message)
        self.copy(max(self._last, time_ns()) if time is None else time, message)
        if isinstance(message, TrapEvent):
            self._seqs[message.vm] = message.seq

    def add_request(
        self,
        packet: BridgePacket,
        answer: BridgeResponse[Any] | None = None,
        *,
        vm: str = "vm",
        vcpu: int = 0,
        kind: OutcomeKind = OutcomeKind.HANDLED,
        handler: str | None = None,
        error: str | None = None,
        accesses: Iterable[tuple[int, bytes]] = (),
        time: int | None = None,
        duration: float = 0.0,
    ) -> int:
        """Append a whole request, by VMCALL of 64-bit code: its trap, the memory that the handler
        read, and its reply. Returns the number of the trap, which counts those of this VM.

        `answer` is what the guest got, stamps included; `None`: its registers stay. `accesses` are
        physical addresses and what was read there. `time` is when the trap was taken, in
        nanoseconds since the Unix epoch, and `duration` the seconds to the reply. Raises as `add`.
        """
        seq = self._seqs.get(vm, 0) + 1
        taken = max(self._last, time_ns()) if time is None else time
        registers = registers_for(packet, TrapReason.VMCALL, 64, X86)
        event = TrapEvent(seq, TrapReason.VMCALL, registers, vm, vcpu, ip=0x1000, length=3, ring=0)
        reply = Reply(
            vm,
            seq,
            vcpu,
            kind,
            packet,
            write_response(event, answer),
            handler,
            error,
            None if answer is None else output_text(answer.output),
            duration,
        )
        messages: list[RecordedMessage] = [event]
        messages += [MemoryAccess(vm, seq, address, len(data), data) for address, data in accesses]
        for message in (*messages, reply):
            self._check(message)
        self._seqs[vm] = seq
        for message in messages:
            self.copy(taken, message)
        self.copy(taken + round(duration * 1e9), reply)
        return seq

    def copy(self, time: int, message: RecordedMessage) -> None:
        """Append a message that was read from a recording or checked: as `add`, and faster.

        Raises `ValueError` for a time that has more than 64 bits.
        """
        if not 0 <= time <= _MAX_TIME:
            raise ValueError(f"a time has 64 bits, got {time}")
        channel = channel_of(message)
        self._open_writer()
        self._last = time
        self.counts[channel.topic] += 1
        if self._chunk.add(channel.id, time, message) >= self._chunk_size:
            self._cut()

    def _check(self, message: RecordedMessage) -> None:
        channel = channel_of(message)
        kind = channel.kind
        if isinstance(message, Session):
            if message.format not in FORMATS:
                raise ValueError(f"format {message.format} is not known; there are {FORMATS}")
            try:
                self._architectures[message.vm] = architecture_of(message)
            except UnknownArchitectureError as error:
                raise ValueError(str(error)) from error
        elif isinstance(message, TrapEvent):
            architecture = self._architectures.get(message.vm, X86)
            if type(message.registers) is not architecture.registers:
                raise TypeError(f"VM {message.vm!a} has the registers of {architecture}")
            kind = trap_type(architecture)
        try:
            payload = _encode(message)
            msgspec.msgpack.decode(payload, type=kind)
        except (msgspec.MsgspecError, OverflowError) as error:
            raise ValueError(f"no {channel.topic} that a recording may have: {error}") from error
        if len(payload) > MAX_MESSAGE:
            raise ValueError(f"a message has {len(payload)} bytes, {MAX_MESSAGE} is the most")

    def _cut(self) -> None:
        if not len(self._chunk):
            return
        try:
            self._open_writer().add(self._chunk.pack())
        except OSError as error:
            raise RecordingError(f"{self.path}: {error.strerror}") from error
        self._chunk = ChunkBuilder()

    def _open_writer(self) -> RecordingWriter:
        if self._writer is None:
            raise RecordingError(f"{self.path}: is not open: use it in 'with NewRecording(...)'")
        return self._writer


def registers_for(
    packet: BridgePacket, reason: TrapReason, width: int, architecture: Architecture[Any]
) -> Any:
    """Registers in which a guest asks that. Raises `UnsupportedTrapError` for a trap that carries
    no request; values that the form has no register for are left out."""
    names = form_of(reason, width).names
    values = (packet.magic, packet.request | packet.method << 16, *packet.values)
    return architecture.registers(**dict(zip(names, values, strict=False)))
