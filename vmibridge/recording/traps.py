"""A recording trap by trap: what was asked, the memory that was accessed, the reply.

A trap is given when its reply was read, so in the order of the replies; one without a
reply at the end. Only traps without a reply yet are held, and those are bounded: a file may
hold any number.
"""

from collections.abc import Iterable, Iterator

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import MemoryAccess, Reply
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


def outcome_word(trap: RecordedTrap) -> str:
    """How a trap ended, in one word; `NO_REPLY` without a reply."""
    return NO_REPLY if trap.reply is None else trap.reply.kind.value


def recorded_traps(messages: Iterable[TimedMessage]) -> Iterator[RecordedTrap]:
    """The traps among these messages. Accesses and replies whose trap was lost are left out."""
    open_traps: dict[tuple[str, int], RecordedTrap] = {}
    held = named = 0
    for time, message in messages:
        if isinstance(message, TrapEvent):
            key = (message.vm, message.seq)
            named += len(message.vm)
            while open_traps and (
                key in open_traps or len(open_traps) >= _MAX_OPEN or named > _MAX_NAMED
            ):
                stale = open_traps.pop(key if key in open_traps else next(iter(open_traps)))
                held -= _size(stale)
                named -= len(stale.event.vm)
                yield stale
            open_traps[key] = RecordedTrap(time, message, request_in(message))
        elif isinstance(message, MemoryAccess):
            trap = open_traps.get((message.vm, message.seq))
            if trap is not None:
                size = _access_size(message)
                if held + size > _MAX_HELD:
                    trap.left_out += 1
                else:
                    trap.accesses.append(message)
                    held += size
        elif isinstance(message, Reply):
            trap = open_traps.pop((message.vm, message.seq), None)
            if trap is not None:
                trap.reply, trap.reply_time = message, time
                held -= _size(trap)
                named -= len(message.vm)
                yield trap
    yield from open_traps.values()


def _size(trap: RecordedTrap) -> int:
    return sum(map(_access_size, trap.accesses))


def _access_size(access: MemoryAccess) -> int:
    # An access without bytes takes room, too.
    return 256 + len(access.data or b"") + len(access.error or "") + len(access.vm)
