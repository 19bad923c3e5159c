"""Reads recordings, and believes nothing that they say.

- A length is checked against the file and `MAX_RECORD`, a size against `MAX_CHUNK`, before
  anything is allocated; a chunk has to unpack to exactly the size that it states, and to
  its CRC. Payloads are decoded into the structs of `messages`, and into nothing else.
- The registers of a trap are those of the architecture that the session of its VM names. A file
  with an architecture that is not known is not read: its traps would be read as others.
- What cannot be read costs itself only: a message, or a chunk. It is listed in `problems`,
  with its place. Where reading goes on behind a damaged chunk is in `damage`.
- A recording behind the end of another is read, too: files that were put together.
- The index at the end is not used: a file that was cut short has none.

Blocking, one chunk in memory at a time.
"""

import os
import struct
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import msgspec
from mcap.opcode import Opcode
from mcap.writer import MCAP0_MAGIC

from vmibridge.errors import RecordingReadError, UnknownArchitectureError
from vmibridge.recording.file.damage import (
    MARK,
    MARK_AT,
    ChunkSearch,
    Problem,
    Problems,
    problem_lines,
    recover_line,
)
from vmibridge.recording.file.folder import is_locked
from vmibridge.recording.file.growing import size_with_record
from vmibridge.recording.file.source import STANDARD_INPUT, open_recording
from vmibridge.recording.file.unpack import CHUNK, FRAME, MAX_CHUNK, MAX_RECORD, text, unpack
from vmibridge.recording.file.writer import PROFILE
from vmibridge.recording.messages import (
    CHANNEL_OF_TOPIC,
    CHANNELS,
    FILE_CHANNELS,
    FORMATS,
    MAX_PLAIN,
    NOTE,
    PLAIN,
    REPLY,
    SESSION,
    TRAP,
    ChannelKind,
    PlainTrap,
    PlainTraps,
    RecordedMessage,
    Session,
    architecture_of,
    plain_type,
    trap_type,
)
from vmibridge.text import counted, fault_of
from vmibridge.vm.trap import TrapEvent

MAX_MESSAGE = MAX_CHUNK - (2 << 20)
"""Bytes of a message: with those of before it, it still fits into a chunk when recovered."""

_MESSAGE = struct.Struct("<HIQQ")
_INDEX = struct.Struct("<BQHI")


class _VmOfTrap(msgspec.Struct):
    vm: str = "vm"


class _VmOfPlain(msgspec.Struct, array_like=True):
    time: int
    event: _VmOfTrap


class _Undecoded(msgspec.Struct):
    traps: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_PLAIN)]


_vm_of_trap = msgspec.msgpack.Decoder(_VmOfTrap).decode
_vm_of_plain = msgspec.msgpack.Decoder(_VmOfPlain).decode
_undecoded = msgspec.msgpack.Decoder(_Undecoded).decode


@cache
def _decoder_of(kind: type[Any]) -> Callable[[memoryview], Any]:
    # One for each architecture: a file may have any number of sessions.
    return msgspec.msgpack.Decoder(kind).decode


class TimedMessage(NamedTuple):
    """One message of a recording."""

    time: int
    """Nanoseconds since the Unix epoch."""
    message: RecordedMessage


def taken_apart(plain: PlainTrap) -> list[TimedMessage]:
    """A plain trap as its trap and its reply, which is left out where the trap has no request."""
    reply = plain.reply()
    taken = TimedMessage(plain.time, plain.event)
    return [taken] if reply is None else [taken, TimedMessage(plain.answered, reply)]


class RecordingReader:
    """One file. `with` it; iterate over `messages` once or more, each time from the start."""

    def __init__(self, path: Path | str, *, wait: Callable[[], object] | None = None) -> None:
        """`-` is standard input. `wait` is called where a file ends that is still being written.
        Raises `RecordingReadError` for a file that cannot be opened or is not a recording."""
        self.path: Path = Path(path)
        self._problems = Problems()
        self.complete: bool = False
        """After a pass: whether the file ends as a recorder ends it."""
        self.is_written: bool = False
        """After a pass: whether the file ends there because it is still being written."""
        self.bytes_read: int = 0
        """How far this pass has come."""
        self.bytes_unpacked: int = 0
        """What the chunks came to, in this pass."""
        self._wait = wait
        self.skip_before: int = 0
        """Chunks whose traps were all taken before this time, in nanoseconds since the Unix epoch,
        are left out unread, with their retries; sessions and other notes are not. For the rest of
        this pass, and of files that vmibridge has written."""
        self._is_ours = False
        self._next = 0
        self._search = ChunkSearch(self._at)
        try:
            self._file = open_recording(self.path)
            self.size: int = os.fstat(self._file.fileno()).st_size
            start = self._file.read(len(MCAP0_MAGIC))
        except OSError as error:
            raise RecordingReadError(f"{path}: {error.strerror}") from error
        if start != MCAP0_MAGIC:
            self._file.close()
            what = "is empty" if not start else "is not an MCAP file"
            raise RecordingReadError(f"{path}: {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def problems(self) -> list[Problem]:
        """What could not be read, so far in this pass; at most 100 are kept."""
        return self._problems.kept

    @property
    def problem_count(self) -> int:
        """How much could not be read, so far in this pass."""
        return self._problems.count

    def problem_lines(self) -> list[str]:
        """What could not be read, so far in this pass, for people: the first problems, and then the
        command that makes a clean file of it, unless it is still being written or a stream."""
        lines = problem_lines(self.problems, self.problem_count, f"{self.path}: ")
        if (advice := self.advice) is not None:
            lines.append(f"{self.path}: {advice}")
        return lines

    @property
    def advice(self) -> str | None:
        """The command that makes a clean file of it; `None`: it is one, so far in this pass, or is
        still being written, or is a stream."""
        if self.problem_count <= self.is_written or self.path == STANDARD_INPUT:
            return None
        return recover_line(self.path, truncated=not self.complete)

    def messages(self, *kinds: ChannelKind) -> Iterator[TimedMessage]:
        """What was recorded, in order; only of these channels, where any are named.

        Raises `RecordingReadError` for an MCAP file of something else, and for a recording of a
        format or an architecture that is not known here.
        """
        wanted = {channel.id for channel in kinds or CHANNELS}
        has_traps, has_replies = TRAP.id in wanted, REPLY.id in wanted
        if has_traps or has_replies:
            wanted.add(PLAIN.id)
        for offset, data in self.chunks():
            for each in self._decode(offset, data, wanted):
                if not isinstance(each, PlainTraps):
                    yield each
                    continue
                for plain in each.traps:
                    if not has_replies:
                        yield TimedMessage(plain.time, plain.event)
                        continue
                    apart = taken_apart(plain)
                    if len(apart) == 1:
                        self._problems.add(offset, "a trap without a request has a reply")
                    yield from apart if has_traps else apart[1:]

    def messages_of_file(self) -> Iterator[TimedMessage | PlainTraps]:
        """All messages as the file has them: plain traps together with their replies. Raises as
        `messages`."""
        given = {channel.id for channel in FILE_CHANNELS}
        for offset, data in self.chunks():
            yield from self._decode(offset, data, given)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """The records of each chunk, unpacked, with the chunk's place in the file."""
        self._problems = Problems()
        self.complete = self.is_written = False
        self.bytes_unpacked = 0
        self.skip_before = 0
        self._search = ChunkSearch(self._at)
        self._channels = {channel.id: channel for channel in FILE_CHANNELS}
        self._decoders: dict[int, Callable[[memoryview], Any]] = {
            channel.id: msgspec.msgpack.Decoder(channel.kind).decode for channel in FILE_CHANNELS
        }
        self._traps_of: dict[str, Callable[[memoryview], Any]] = {}
        self._plain_of: dict[str, Callable[[memoryview], Any]] = {}
        begin = 0
        for at, opcode, length in self._records():
            start, end = at + FRAME.size, at + FRAME.size + length
            if opcode == Opcode.CHUNK:
                try:
                    data = unpack(self._at(start, length))
                except ValueError as error:
                    self._problems.add(at, f"a chunk is damaged: {error}")
                    # `_records` goes on there.
                    self._next = self._search.behind(at, length, self.size)
                else:
                    self.bytes_unpacked += len(data)
                    yield at, data
            elif opcode == Opcode.HEADER and at == begin + len(MCAP0_MAGIC):
                self._check_header(at, self._at(start, length))
            elif opcode == Opcode.CHANNEL:
                self._learn_channel(self._at(start, length))
            elif opcode == Opcode.MESSAGE:
                # Outside of chunks, as other tools may write it.
                yield at, self._at(at, FRAME.size + length)
            elif opcode == Opcode.FOOTER and self._at(end, len(MCAP0_MAGIC)) == MCAP0_MAGIC:
                begin = end + len(MCAP0_MAGIC)
                if self._at(begin, len(MCAP0_MAGIC)) != MCAP0_MAGIC:
                    self.complete = True
                    if begin < self.size:
                        what = ("byte behind the end is", "bytes behind the end are")
                        self._problems.add(begin, f"{counted(self.size - begin, *what)} not read")
                    break
                # Recordings that were put together, as by `cat`: the next one follows.
                self._next = begin + len(MCAP0_MAGIC)
                self._channels = {channel.id: channel for channel in FILE_CHANNELS}
        self.bytes_read = self.size
        if not self.complete:
            self.is_written = is_locked(self._file.fileno())
            why = "is being written" if self.is_written else "is truncated, or was not finished"
            self._problems.add(self._next, f"the file ends here: it {why}")

    def _may_skip(self, start: int, end: int) -> bool:
        """Whether a chunk has only what was before `skip_before`, and no session and no note."""
        head = self._at(start, CHUNK.size)
        if not self._is_ours or len(head) < CHUNK.size:
            return False
        first, last, _, _ = CHUNK.unpack(head)
        if not first <= last < self.skip_before:
            return False
        while len(frame := self._at(end, _INDEX.size)) == _INDEX.size:
            opcode, length, channel, _ = _INDEX.unpack(frame)
            if opcode != Opcode.MESSAGE_INDEX:
                break
            if channel in (SESSION.id, NOTE.id):
                return False
            end += FRAME.size + length
        return True

    def _records(self) -> Iterator[tuple[int, int, int]]:
        """Place, opcode and length of each record; the length is that of the body, and true."""
        self._next = len(MCAP0_MAGIC)
        while True:
            at = self.bytes_read = self._next
            if self._wait is not None:
                self.size = size_with_record(self._file, at, self.size, MAX_RECORD, self._wait)
            head = self._at(at, MARK_AT + len(MARK))
            if len(head) < FRAME.size:
                return
            opcode, length = FRAME.unpack_from(head)
            end = at + FRAME.size + length
            # One wrong byte would cost a whole chunk that is sound otherwise: its CRC decides.
            if opcode != Opcode.CHUNK and head[MARK_AT:] == MARK:
                self._problems.add(at, f"a chunk is damaged: its opcode is {opcode}")
                opcode = Opcode.CHUNK
            fits = length <= MAX_RECORD and end <= self.size
            if opcode == Opcode.MESSAGE_INDEX and len(head) >= _INDEX.size:
                # A wrong length would reach over sound chunks.
                fits = fits and length == 6 + _INDEX.unpack_from(head)[3]
            if opcode and fits:
                self._next = end
                if self.skip_before and opcode == Opcode.CHUNK and self._may_skip(at + 9, end):
                    continue
                yield at, opcode, length
                continue
            found = self._search.next_chunk(at + 1, self.size)
            if found is None:
                return
            self._problems.add(at, f"{counted(found - at, 'byte is', 'bytes are')} damaged")
            self._next = found

    def _decode(
        self, offset: int, data: bytes, given: Collection[int]
    ) -> Iterator[TimedMessage | PlainTraps]:
        at, size = 0, len(data)
        # Sessions in any case: they say how to read the rest.
        needed = {SESSION.id, *given}
        decoders = self._decoders
        # A chunk may describe channels in front of their messages.
        channel_of = self._channels.get
        view = memoryview(data)
        frame, head = FRAME.unpack_from, _MESSAGE.unpack_from
        # Each message passes here, so opcodes and sizes are numbers: a frame has 9 bytes, the head
        # of a MESSAGE (5) has 22; 4 is CHANNEL.
        while at < size:
            if size - at < 9:
                self._problems.add(offset, "a chunk ends in the middle of a record")
                return
            opcode, length = frame(data, at)
            at += 9
            end = at + length
            if end > size:
                self._problems.add(offset, "a chunk ends in the middle of a record")
                return
            if opcode == 5:
                if length < 22:
                    self._problems.add(offset, "a message is too short")
                    return
                if length > MAX_MESSAGE:
                    self._problems.add(
                        offset, f"a message has {length} bytes, {MAX_MESSAGE} is the most"
                    )
                    at = end
                    continue
                number, _, time, _ = head(data, at)
                channel = channel_of(number)
                if channel is not None and channel.id in needed:
                    try:
                        message = decoders[channel.id](view[at + 22 : end])
                    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                        self._problems.add(
                            offset, f"a message cannot be decoded: {fault_of(error)}"
                        )
                    else:
                        if type(message) is Session:
                            self._begin(message)
                        if channel.id in given:
                            yield (
                                message
                                if type(message) is PlainTraps
                                else TimedMessage(time, message)
                            )
            elif opcode == 4:
                self._learn_channel(data[at:end])
            at = end

    def _begin(self, session: Session) -> None:
        """What follows of this VM is of its session."""
        if session.format not in FORMATS:
            raise RecordingReadError(
                f"{self.path}: has format {session.format}, and this version of vmibridge reads"
                f" formats {FORMATS[0]} to {FORMATS[-1]}"
            )
        try:
            architecture = architecture_of(session)
        except UnknownArchitectureError as error:
            raise RecordingReadError(f"{self.path}: {error}") from error
        kind = trap_type(architecture)
        if kind is TrapEvent and not self._traps_of:
            # Only x86 so far: traps are decoded once, without a look at their VM first.
            return
        self._traps_of[session.vm] = _decoder_of(kind)
        self._plain_of[session.vm] = _decoder_of(plain_type(architecture))
        self._decoders[TRAP.id], self._decoders[PLAIN.id] = self._decode_trap, self._decode_plain

    def _decode_trap(self, data: memoryview) -> TrapEvent:
        """A trap of a file that has a VM of another architecture than x86."""
        decode = self._traps_of.get(_vm_of_trap(data).vm, _decoder_of(TrapEvent))
        event: TrapEvent = decode(data)
        return event

    def _decode_plain(self, data: memoryview) -> PlainTraps:
        """The same for plain traps."""
        traps: list[PlainTrap] = []
        for raw in _undecoded(data).traps:
            decode = self._plain_of.get(_vm_of_plain(raw).event.vm, _decoder_of(PlainTrap))
            traps.append(decode(memoryview(raw)))
        return PlainTraps(traps)

    def _at(self, offset: int, size: int) -> bytes:
        """At most `size` bytes there; fewer at the end of the file."""
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError as error:
            raise RecordingReadError(f"{self.path}: {error.strerror}") from error

    def _check_header(self, at: int, body: bytes) -> None:
        try:
            profile, at_library = text(body, 0)
            self._is_ours = text(body, at_library)[0].startswith(PROFILE)
        except ValueError:
            self._problems.add(at, "the header is damaged")
            return
        if profile != PROFILE:
            raise RecordingReadError(
                f"{self.path}: is an MCAP file of profile {profile[:40]!r}, no recording"
            )

    def _learn_channel(self, body: bytes) -> None:
        # Files that other tools have rewritten may number them in another way.
        try:
            (number,) = struct.unpack_from("<H", body)
            topic, _ = text(body, 4)
        except (ValueError, struct.error):
            return
        channel = CHANNEL_OF_TOPIC.get(topic)
        if channel is None:
            self._channels.pop(number, None)
        else:
            self._channels[number] = channel
