"""When a recording goes on in another file, and what that file begins with.

A recording that has a size, or a time, is a row of files, its *parts*. Each can be read, replayed
and reported by itself: it begins with the sessions of the VMs that run. On the loop, so nothing is
known yet of how small a chunk becomes: what is not written counts as if it could not be compressed,
and so a file is never larger than its size.

| the file has | it is split |
|---|---|
| less than 7/8 of its size | no |
| 7/8 and more | before a trap, when no request is open: every part is whole |
| no room for the next trap or memory access | before that, with requests open |
| been written for its time | as soon as no request is open; after 9/8 of it with requests open |

A request is open from its first trap to its last reply: what was told to wait is open between its
traps, too. Those that are open at a split are in both files, and compared in neither: in the one
before there is no last reply, and the one behind has their traps again, each with a note of kind
`lost` right behind it.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.recording.messages import NOTE, SESSION, TRAP, ChannelKind, Note, Session
from vmibridge.vm.trap import TrapEvent

__all__ = ["MIN_SIZE", "Rotation", "part_size"]

MIN_SIZE = 128 << 10
"""Bytes: the least that a file may be bounded to."""
_FIXED = 32 << 10
"""More than a file has without a message: schemas and channels, at its start and in its index."""
_CHUNK_OF_INDEX = 256
"""More than a chunk has in the index."""
_MESSAGE = 1024
"""More than a trap, or a memory access without its data, has."""
_MAX_WAITING = 4096
"""Requests told to wait that are remembered; a guest need not come back for any."""
_QUARTER = 4
_LATEST = 9 / 8
"""Of the time of a file: then it is split with requests open."""


def part_size(
    max_size: int | None, max_age: float | None, max_total: int | None, max_files: int | None
) -> int | None:
    """The bytes of a file; `None`: any. Where not given, they follow from those of all files.

    Raises `ValueError` if one of them is out of range.
    """
    if max_age is not None and not max_age >= 1:
        raise ValueError(f"max_age is at least 1 second, got {max_age!r}")
    if max_files is not None and max_files < 1:
        raise ValueError(f"max_files is at least 1, got {max_files!r}")
    if max_size is not None and max_size < MIN_SIZE:
        raise ValueError(f"max_size is at least {MIN_SIZE} bytes, got {max_size!r}")
    if max_total is None:
        return max_size
    if max_size is None:
        max_size = max_total // _QUARTER
        if max_size < MIN_SIZE:
            raise ValueError(
                f"max_total is at least {_QUARTER * MIN_SIZE} bytes, got {max_total!r}"
            )
    if max_total < 2 * max_size:
        raise ValueError(f"max_total is at least twice max_size, got {max_total!r}")
    return max_size


class Rotation:
    """See the module. Its calls are those of a tap, and of the recorder that has it."""

    def __init__(
        self,
        max_size: int | None,
        max_age: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_size` is in bytes, `max_age` in seconds of `clock`; `None`: any."""
        self.part: int = 1
        """The number of the file that messages go to."""
        self._max_size: float = math.inf if max_size is None else max_size
        self._max_age = max_age
        self._clock = clock
        self._began = clock()
        self._sessions: dict[str, Session] = {}
        self._open: dict[tuple[str, int], TrapEvent] = {}
        self._waiting: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._used = 0
        self._begin_with(0)

    def _begin_with(self, preamble: int) -> None:
        # What a part begins with is at most half of it: else there would be one for each trap.
        self._room = max(self._max_size - _FIXED, 2 * preamble)
        self._preamble = preamble
        self._quiet_from = self._room * 7 / 8

    # --- what is open -----------------------------------------------------------------

    def begin(self, session: Session) -> Session:
        """A VM is about to run. Returns what is told of it: with the number of this part."""
        self._sessions[session.vm] = session
        return msgspec.structs.replace(session, part=self.part)

    def end(self, vm: str) -> None:
        """A VM has ended."""
        self._sessions.pop(vm, None)
        for key in [key for key in self._open if key[0] == vm]:
            del self._open[key]
        for key in [key for key in self._waiting if key[0] == vm]:
            del self._waiting[key]

    def trap(self, event: TrapEvent) -> None:
        """A trap is in the file."""
        self._open[event.vm, event.seq] = event

    def answered(self, event: TrapEvent, outcome: Outcome[Any]) -> None:
        """A trap was answered."""
        self._open.pop((event.vm, event.seq), None)
        first = (event.vm, event.seq if outcome.retry_of is None else outcome.retry_of)
        if outcome.kind is OutcomeKind.WAITING:
            self._waiting[first] = None
            if len(self._waiting) > _MAX_WAITING:
                self._waiting.popitem(last=False)
        elif self._waiting:
            self._waiting.pop(first, None)

    # --- how large it is ----------------------------------------------------------------

    def is_due(self, uncut: int, data: int = 0) -> bool:
        """Whether to split before a message with this much data; `uncut`: bytes of the chunk."""
        size = self._used + _most(uncut)
        if size <= self._preamble:
            # A single access may be larger than a file.
            return False
        if size + _most(data + _MESSAGE) > self._room:
            return True
        age = 0.0 if self._max_age is None else (self._clock() - self._began) / self._max_age
        if self._open or self._waiting:
            return age > _LATEST
        return age > 1 or size > self._quiet_from

    def cut(self, size: int) -> None:
        """A chunk of `size` bytes goes to the writer."""
        self._used += _most(size)

    def written(self, part: int, size: int, in_file: int) -> None:
        """It takes `in_file` bytes of the file of that part."""
        if part == self.part:
            self._used += in_file + _CHUNK_OF_INDEX - _most(size)

    def next_part(self) -> int:
        """Begin another part, and return its number; `begun` has to follow."""
        self.part += 1
        self._used = 0
        self._began = self._clock()
        return self.part

    def go_back_to(self, part: int) -> None:
        """No file of a later part could be made: the next one is the one after this."""
        self.part = part

    def preamble(self) -> Iterator[tuple[ChannelKind, Session | TrapEvent | Note]]:
        """What it begins with."""
        for session in self._sessions.values():
            yield SESSION, msgspec.structs.replace(session, part=self.part)
        for event in self._open.values():
            text = f"trap {event.seq} was taken in the file before this one, part {self.part - 1}"
            yield TRAP, event
            yield NOTE, Note("lost", text, event.vm, event.seq)

    def begun(self, uncut: int) -> None:
        """It has its preamble; `uncut`: bytes of the chunk."""
        # Retries of what waited are not known here any more: a replay leaves them out, too.
        self._waiting.clear()
        self._begin_with(self._used + _most(uncut))


def _most(size: int) -> int:
    """Bytes of a file that a chunk takes at the most: it may be incompressible, and has an entry
    of 16 bytes in its own index for each message, which has 31 bytes and its map."""
    return size + size // 2 + _MESSAGE
