"""Reads recordings, and believes nothing that they say.

- A length is checked against the file and `MAX_RECORD`, a size against `MAX_CHUNK`, before
  anything is allocated; a chunk has to unpack to exactly the size that it states, and to
  its CRC. Payloads are decoded into the structs of `messages`, and into nothing else.
- The registers of a trap are those of the architecture that the session of its VM names. A file
  with an architecture that is not known is not read: its traps would be read as others.
- What cannot be read costs itself only: a message, or a chunk. It is listed in `problems`,
  with its place. Where a length is wrong, reading goes on at the next thing that has the
  looks and the CRC of a chunk.
- A recording behind the end of another is read, too: files that were put together.
- The index at the end is not used: a file that was cut short has none.

Blocking, one chunk in memory at a time.
"""

import os
import struct
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from mcap.opcode import Opcode
from mcap.writer import MCAP0_MAGIC

from vmibridge.errors import RecordingReadError, UnknownArchitectureError
from vmibridge.recording.file.folder import is_locked
from vmibridge.recording.file.growing import size_with_record
from vmibridge.recording.file.source import open_recording
from vmibridge.recording.file.unpack import CHUNK, MAX_CHUNK, lengths_agree, text
from vmibridge.recording.file.unpack import unpack as _unpack
from vmibridge.recording.file.writer import PROFILE
from vmibridge.recording.messages import (
    CHANNEL_OF_TOPIC,
    CHANNELS,
    FORMATS,
    NOTE,
    SESSION,
    TRAP,
    ChannelKind,
    RecordedMessage,
    Session,
    architecture_of,
    trap_type,
)
from vmibridge.text import counted
from vmibridge.vm.trap import TrapEvent

MAX_RECORD = MAX_CHUNK + (1 << 20)
"""Bytes of a record in the file."""
MAX_MESSAGE = MAX_CHUNK - (2 << 20)
"""Bytes of a message: with those of before it, it still fits into a chunk when recovered."""
_MAX_PROBLEMS = 100
_MAX_TEXT = 200
"""Characters of a problem, which may quote the file."""
_MAX_GUESSES = 1000
"""Places that look like a chunk and are none, after which a search is given up."""
_SEARCH = 1 << 20

_FRAME = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_INDEX = struct.Struct("<BQHI")


class _VmOfTrap(msgspec.Struct):
    vm: str = "vm"


_vm_of_trap = msgspec.msgpack.Decoder(_VmOfTrap).decode


@cache
def _decoder_of(kind: type[TrapEvent]) -> Callable[[memoryview], Any]:
    # One for each architecture: a file may have any number of sessions.
    return msgspec.msgpack.Decoder(kind).decode


# "zstd" with its length in front, and the length and the first bytes of the data behind.
_MARK = b"\x04\0\0\0zstd"
_MARK_AT = _FRAME.size + CHUNK.size


class Problem(msgspec.Struct, frozen=True):
    """Something in a file that could not be read."""

    offset: int
    """Where in the file, in bytes."""
    text: str

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.text}"


class TimedMessage(NamedTuple):
    """One message of a recording."""

    time: int
    """Nanoseconds since the Unix epoch."""
    message: RecordedMessage


class RecordingReader:
    """One file. `with` it; iterate over `messages` once or more, each time from the start."""

    def __init__(self, path: Path | str, *, wait: Callable[[], object] | None = None) -> None:
        """`-` is standard input. `wait` is called where a file ends that is still being written.
        Raises `RecordingReadError` for a file that cannot be opened or is no recording."""
        self.path: Path = Path(path)
        self.problems: list[Problem] = []
        """What could not be read, so far in this pass; at most 100 are kept."""
        self.problem_count: int = 0
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
        self._tried = 0
        """Bytes, in this pass, that looked like a chunk and were none."""
        try:
            self._file = open_recording(self.path)
            self.size: int = os.fstat(self._file.fileno()).st_size
            start = self._file.read(len(MCAP0_MAGIC))
        except OSError as error:
            raise RecordingReadError(f"{path}: {error.strerror}") from error
        if start != MCAP0_MAGIC:
            self._file.close()
            what = "is empty" if not start else "is no MCAP file"
            raise RecordingReadError(f"{path}: {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def messages(self, *kinds: ChannelKind) -> Iterator[TimedMessage]:
        """What was recorded, in order; only of these channels, where any are named.

        Raises `RecordingReadError` for an MCAP file of something else, and for a recording of a
        format or an architecture that is not known here.
        """
        wanted = kinds or CHANNELS
        for offset, data in self.chunks():
            yield from self._decode(offset, data, wanted)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """The records of each chunk, unpacked, with the chunk's place in the file."""
        self.problems, self.problem_count = [], 0
        self.complete = self.is_written = False
        self.bytes_unpacked = 0
        self.skip_before = 0
        self._tried = 0
        self._channels = {channel.id: channel for channel in CHANNELS}
        self._decoders: dict[int, Callable[[memoryview], Any]] = {
            channel.id: msgspec.msgpack.Decoder(channel.kind).decode for channel in CHANNELS
        }
        self._traps_of: dict[str, Callable[[memoryview], Any]] = {}
        begin = 0
        for at, opcode, length in self._records():
            start, end = at + _FRAME.size, at + _FRAME.size + length
            if opcode == Opcode.CHUNK:
                try:
                    data = _unpack(self._at(start, length))
                except ValueError as error:
                    # Its length may be wrong, too, and reach over sound chunks. It is believed if
                    # the lengths inside agree and a record follows. `_records` goes on at `_next`.
                    self._add_problem(at, f"a chunk is damaged: {error}")
                    sound = lengths_agree(self._at(start, length)) and self._is_record(end)
                    if not sound:
                        self._next = self._search(at + 1) or self.size
                else:
                    self.bytes_unpacked += len(data)
                    yield at, data
            elif opcode == Opcode.HEADER and at == begin + len(MCAP0_MAGIC):
                self._check_header(at, self._at(start, length))
            elif opcode == Opcode.CHANNEL:
                self._learn_channel(self._at(start, length))
            elif opcode == Opcode.MESSAGE:
                # Outside of chunks, as other tools may write it.
                yield at, self._at(at, _FRAME.size + length)
            elif opcode == Opcode.FOOTER and self._at(end, len(MCAP0_MAGIC)) == MCAP0_MAGIC:
                begin = end + len(MCAP0_MAGIC)
                if self._at(begin, len(MCAP0_MAGIC)) != MCAP0_MAGIC:
                    self.complete = True
                    if begin < self.size:
                        what = ("byte behind the end is", "bytes behind the end are")
                        self._add_problem(begin, f"{counted(self.size - begin, *what)} not read")
                    break
                # Recordings that were put together, as by `cat`: the next one follows.
                self._next = begin + len(MCAP0_MAGIC)
                self._channels = {channel.id: channel for channel in CHANNELS}
        self.bytes_read = self.size
        if not self.complete:
            self.is_written = is_locked(self._file.fileno())
            why = "is being written" if self.is_written else "is truncated, or was not finished"
            self._add_problem(self._next, f"the file ends here: it {why}")

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
            end += _FRAME.size + length
        return True

    def _records(self) -> Iterator[tuple[int, int, int]]:
        """Place, opcode and length of each record; the length is that of the body, and true."""
        self._next = len(MCAP0_MAGIC)
        while True:
            at = self.bytes_read = self._next
            if self._wait is not None:
                self.size = size_with_record(self._file, at, self.size, MAX_RECORD, self._wait)
            head = self._at(at, _MARK_AT + len(_MARK))
            if len(head) < _FRAME.size:
                return
            opcode, length = _FRAME.unpack_from(head)
            end = at + _FRAME.size + length
            # One wrong byte would cost a whole chunk that is sound otherwise: its CRC decides.
            if opcode != Opcode.CHUNK and head[_MARK_AT:] == _MARK:
                self._add_problem(at, f"a chunk is damaged: its opcode is {opcode}")
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
            found = self._search(at + 1)
            if found is None:
                return
            self._add_problem(at, f"{counted(found - at, 'byte is', 'bytes are')} damaged")
            self._next = found

    def _decode(
        self, offset: int, data: bytes, wanted: Collection[ChannelKind]
    ) -> Iterator[TimedMessage]:
        at, size = 0, len(data)
        # Sessions in any case: they say how to read the rest.
        given = {channel.id for channel in wanted}
        needed = {SESSION.id, *given}
        decoders = self._decoders
        # A chunk may describe channels in front of their messages.
        channel_of = self._channels.get
        view = memoryview(data)
        frame, head = _FRAME.unpack_from, _MESSAGE.unpack_from
        # Each message passes here, so opcodes and sizes are numbers: a frame has 9 bytes, the head
        # of a MESSAGE (5) has 22; 4 is CHANNEL.
        while at < size:
            if size - at < 9:
                self._add_problem(offset, "a chunk ends in the middle of a record")
                return
            opcode, length = frame(data, at)
            at += 9
            end = at + length
            if end > size:
                self._add_problem(offset, "a chunk ends in the middle of a record")
                return
            if opcode == 5:
                if length < 22:
                    self._add_problem(offset, "a message is too short")
                    return
                if length > MAX_MESSAGE:
                    self._add_problem(
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
                        self._add_problem(offset, f"a message cannot be decoded: {error}")
                    else:
                        if type(message) is Session:
                            self._begin(message)
                        if channel.id in given:
                            yield TimedMessage(time, message)
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
            kind = trap_type(architecture_of(session))
        except UnknownArchitectureError as error:
            raise RecordingReadError(f"{self.path}: {error}") from error
        if kind is TrapEvent and not self._traps_of:
            # Only x86 so far: traps are decoded once, without a look at their VM first.
            return
        self._traps_of[session.vm] = _decoder_of(kind)
        self._decoders[TRAP.id] = self._decode_trap

    def _decode_trap(self, data: memoryview) -> TrapEvent:
        """A trap of a file that has a VM of another architecture than x86."""
        decode = self._traps_of.get(_vm_of_trap(data).vm, _decoder_of(TrapEvent))
        event: TrapEvent = decode(data)
        return event

    def _at(self, offset: int, size: int) -> bytes:
        """At most `size` bytes there; fewer at the end of the file."""
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError as error:
            raise RecordingReadError(f"{self.path}: {error.strerror}") from error

    def _is_record(self, offset: int) -> bool:
        frame = self._at(offset, _FRAME.size)
        if len(frame) < _FRAME.size:
            return False
        opcode, length = _FRAME.unpack(frame)
        fits: bool = 0 < opcode <= Opcode.DATA_END and offset + _FRAME.size + length <= self.size
        return fits

    def _search(self, start: int) -> int | None:
        """Where the next sound chunk is."""
        guesses = 0
        at = start
        while at < self.size:
            # Longer by a head than the step: a chunk that crosses the border is seen whole.
            window = self._at(at, _SEARCH + _MARK_AT + len(_MARK))
            mark = window.find(_MARK, _MARK_AT)
            while mark >= 0:
                place = at + mark - _MARK_AT
                opcode, length = _FRAME.unpack_from(window, mark - _MARK_AT)
                if opcode == Opcode.CHUNK and length <= min(MAX_RECORD, self.size - place - 9):
                    try:
                        _unpack(self._at(place + 9, length))
                    except ValueError:
                        guesses += 1
                        self._tried += length
                        # True chunks that are damaged do not overlap. False ones that do, and are
                        # large, would each be read and unpacked: the square of the file.
                        if guesses > _MAX_GUESSES or self._tried > self.size:
                            return None
                    else:
                        return place
                mark = window.find(_MARK, mark + 1)
            at += _SEARCH
        return None

    def _check_header(self, at: int, body: bytes) -> None:
        try:
            profile, at_library = text(body, 0)
            self._is_ours = text(body, at_library)[0].startswith(PROFILE)
        except ValueError:
            self._add_problem(at, "the header is damaged")
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

    def _add_problem(self, offset: int, text: str) -> None:
        self.problem_count += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(offset, text[:_MAX_TEXT]))
