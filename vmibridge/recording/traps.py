"""A recording trap by trap: what was asked, the memory that was accessed, the reply.

A trap is given when its reply was read, so in the order of the replies; one without a
reply at the end. Only traps without a reply yet are held, and those are bounded: a file may
hold any number.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import MemoryAccess, Note, Reply
from vmibridge.vm.trap import TrapEvent

_MAX_OPEN = 16_384
"""Traps that may wait for their reply; beyond it the oldest is given without."""
_MAX_HELD = 32 << 20
"""Bytes of memory accesses that they may have; beyond it further ones are left out."""
_MAX_NAMED = 32 << 20
"""Characters that the names of their VMs may have; beyond it the oldest are given without."""


VALUE_NAMES = ("value1", "value2", "value3", "value4")
"""What the values of a request are called, in all that is made of a recording."""
ANSWER_NAMES = ("answer1", "answer2", "answer3", "answer4")
"""What the values that were written are called."""
NO_REPLY = "none"
OUTCOME_WORDS = (*(kind.value for kind in OutcomeKind), NO_REPLY)
"""All that `outcome_word` may return."""


class Mark(NamedTuple):
    """Where a message is in its recording."""

    place: int
    """Among all messages that are read, from 0."""
    time: int
    """Nanoseconds since the Unix epoch."""


class RecordedTrap(msgspec.Struct):
    """One trap of a recording."""

    time: int
    """When it was taken, in nanoseconds since the Unix epoch."""
    event: TrapEvent
    packet: BridgePacket | None
    """`None` for a trap that has no register form."""
    accesses: list[MemoryAccess] = []
    """In the order that they were made."""
    left_out: int = 0
    """Further accesses, which were too much to hold."""
    reply: Reply | None = None
    """`None`: the recording ends before it, or it is among what was lost."""
    reply_time: int | None = None
    place: int = 0
    """Of the trap among the messages that were read, from 0."""
    access_marks: list[Mark] = []
    """Of each of `accesses`."""
    reply_place: int | None = None
    notes: list[tuple[Mark, Note]] = []
    """Those that name this trap, while it has no reply."""


class FlatTrap(NamedTuple):
    """What a trap asked and what came of it, side by side, as each table of traps begins.

    `None` is what a trap without a request, without a reply or without an answer has.
    """

    magic: int | None
    request: int | None
    method: int | None
    values: tuple[int | None, ...]
    """As many as `VALUE_NAMES`."""
    outcome: str | None
    handler: str | None
    error: str | None
    output: str | None
    duration: float | None
    """Seconds."""
    retry_of: int | None
    rip: int | None
    """Where the guest went on; `None`: the instruction ran natively."""
    answers: tuple[int | None, ...]
    """As many as `ANSWER_NAMES`; `None` where a register was left alone."""


_NO_VALUES: tuple[int | None, ...] = (None,) * len(VALUE_NAMES)


def flattened(trap: RecordedTrap) -> FlatTrap:
    """A trap for a table; numbers and texts are as they were recorded."""
    packet, reply = trap.packet, trap.reply
    writes = None if reply is None else reply.writes
    return FlatTrap(
        None if packet is None else packet.magic,
        None if packet is None else packet.request,
        None if packet is None else packet.method,
        _NO_VALUES if packet is None else packet.values,
        None if reply is None else reply.kind.value,
        None if reply is None else reply.handler,
        None if reply is None else reply.error,
        None if reply is None else reply.output,
        None if reply is None else reply.duration,
        None if reply is None else reply.retry_of,
        None if writes is None else writes.rip,
        _NO_VALUES if writes is None else writes.values,
    )


def outcome_word(trap: RecordedTrap) -> str:
    """How a trap ended, in one word; `NO_REPLY` without a reply."""
    return NO_REPLY if trap.reply is None else trap.reply.kind.value


def access_text(access: MemoryAccess) -> str:
    """What was accessed, for people: the first bytes, or why there are none."""
    if access.error is not None:
        return f"failed: {access.error}"
    if access.data is None:
        return "left out"
    return access.data[:32].hex(" ") + (" ..." if len(access.data) > 32 else "")


def ignored(_place: int, _timed: TimedMessage) -> None:
    """For who wants no other messages."""


def recorded_traps(
    messages: Iterable[TimedMessage],
    others: Callable[[int, TimedMessage], object] = ignored,
) -> Iterator[RecordedTrap]:
    """The traps among these messages.

    `others` gets each message that belongs to none of them, with its place: sessions and other
    notes, accesses and replies whose trap was lost, and accesses that are too much to hold.
    """
    open_traps = _OpenTraps()
    for place, timed in enumerate(messages):
        time, message = timed
        if isinstance(message, TrapEvent):
            yield from open_traps.begin(Mark(place, time), message)
        elif isinstance(message, Reply):
            trap = open_traps.end(Mark(place, time), message)
            if trap is not None:
                yield trap
            else:
                others(place, timed)
        elif not isinstance(message, (MemoryAccess, Note)) or not open_traps.add(
            Mark(place, time), message
        ):
            others(place, timed)
    yield from open_traps.left()


class _OpenTraps:
    """Those without a reply yet, and what they hold; see the limits above."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], RecordedTrap] = {}
        self._held = 0
        self._named = 0

    def begin(self, mark: Mark, event: TrapEvent) -> Iterator[RecordedTrap]:
        """A trap was taken. Gives those that have no room beside it."""
        open_traps, key = self._open, (event.vm, event.seq)
        self._named += len(event.vm)
        while open_traps and (
            key in open_traps or len(open_traps) >= _MAX_OPEN or self._named > _MAX_NAMED
        ):
            stale = open_traps.pop(key if key in open_traps else next(iter(open_traps)))
            self._let_go(stale)
            yield stale
        open_traps[key] = RecordedTrap(mark.time, event, request_in(event), place=mark.place)

    def add(self, mark: Mark, message: MemoryAccess | Note) -> bool:
        """Something that names a trap. Returns whether it is held with an open one."""
        if message.vm is None or message.seq is None:
            return False
        trap = self._open.get((message.vm, message.seq))
        if trap is None:
            return False
        if isinstance(message, Note):
            if not self._has_room(_note_size(message)):
                return False
            trap.notes.append((mark, message))
            return True
        if not self._has_room(_access_size(message)):
            trap.left_out += 1
            return False
        trap.accesses.append(message)
        trap.access_marks.append(mark)
        return True

    def end(self, mark: Mark, reply: Reply) -> RecordedTrap | None:
        """A reply. Returns its trap."""
        trap = self._open.pop((reply.vm, reply.seq), None)
        if trap is not None:
            trap.reply, trap.reply_time, trap.reply_place = reply, mark.time, mark.place
            self._let_go(trap)
        return trap

    def left(self) -> Iterable[RecordedTrap]:
        """Those without a reply, at the end."""
        return self._open.values()

    def _has_room(self, size: int) -> bool:
        if self._held + size > _MAX_HELD:
            return False
        self._held += size
        return True

    def _let_go(self, trap: RecordedTrap) -> None:
        self._held -= _size(trap)
        self._named -= len(trap.event.vm)


def _size(trap: RecordedTrap) -> int:
    return sum(map(_access_size, trap.accesses)) + sum(_note_size(note) for _, note in trap.notes)


def _note_size(note: Note) -> int:
    return 512 + len(note.text) + len(note.vm or "") + 128 * len(note.counts)


def _access_size(access: MemoryAccess) -> int:
    # An access without bytes takes room, too.
    return 256 + len(access.data or b"") + len(access.error or "") + len(access.vm)
