"""The memory accesses of a request that is served again, and what differs of it.

| a handler now | gets | is a difference |
|---|---|---|
| reads what it read then | the recorded bytes | in a strict replay, in another order |
| reads something else, of bytes that it knew then | them | in a strict replay |
| reads what it did not know then | `GuestMemoryError` | yes |
| writes what it wrote then | what became of it then | in a strict replay, in another order |
| writes something else | success | yes |
| leaves out a read | | in a strict replay |
| leaves out a write | | yes |
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from vmibridge.errors import GuestMemoryError
from vmibridge.recording.messages import MemoryAccess
from vmibridge.recording.replay.compare import FieldDifference, describe
from vmibridge.recording.replay.request_parts import KeptAccesses, composed
from vmibridge.vm.trap import TrapEvent

__all__ = ["RequestAccesses"]

_MAX_PAST = 64
"""Accesses that are kept when they are done, to tell of them and to read from."""
_MAX_KEPT = 100_000
"""The same, where all of them are to be accepted."""
_MAX_FIELDS = 64
_SHOWN = 16
_UNKNOWN = "it is not in the recording"


class RequestAccesses(ABC):
    """See the module."""

    # Most requests access no memory: what only others need is a default of the class until then.
    held: int = 0
    """Bytes in `pending`."""
    unchecked: str | None = None
    """Why it cannot be compared."""
    _kept: "KeptAccesses | None" = None
    _pending: "deque[tuple[int, MemoryAccess]] | None" = None
    _past: "deque[MemoryAccess] | None" = None
    _differences: Sequence[FieldDifference] = ()
    _told: frozenset[int] = frozenset()
    """Those of `pending` in whose place something else was made."""
    _attached = 0
    _latest = -1

    def __init__(self, event: TrapEvent, *, strict: bool, keeps: bool) -> None:
        """`strict`: the order of accesses counts; `keeps`: all that are made are kept."""
        self.event = event
        """The trap that the request came with."""
        self._strict = strict
        self.keeps: bool = keeps

    @property
    def pending(self) -> "deque[tuple[int, MemoryAccess]]":
        """Accesses that were recorded, and are not made yet; with their places in order."""
        if self._pending is None:
            self._pending = deque()
        return self._pending

    @property
    def has_pending(self) -> bool:
        """Whether there are such."""
        return bool(self._pending)

    @property
    def past(self) -> "deque[MemoryAccess]":
        """Accesses that were made now."""
        if self._past is None:
            self._past = deque(maxlen=_MAX_KEPT if self.keeps else _MAX_PAST)
        return self._past

    @property
    def kept(self) -> KeptAccesses:
        """Its accesses, where all are kept."""
        if self._kept is None:
            self._kept = KeptAccesses()
        return self._kept

    def attach(self, access: MemoryAccess, place: int = 0) -> int:
        """One more recorded access, there in the file; returns the bytes that it holds."""
        if self.keeps:
            self.kept.places.append(place)
        self.pending.append((self._attached, access))
        self._attached += 1
        size = held_size(access)
        self.held += size
        return size

    def take_read(self, address: int, size: int) -> bytes | None:
        """The recorded bytes; `None`: not recorded, as far as is known yet.

        Raises `GuestMemoryError` for a read that failed then, or was left out.
        """
        for place, (number, access) in enumerate(self.pending):
            if access.address == address and access.size == size and not access.write:
                self._take(place, number, access)
                if access.error is not None:
                    raise GuestMemoryError(address, access.error)
                if access.data is None:
                    self.leave_unchecked("memory was left out of the recording")
                    raise GuestMemoryError(address, "it was left out of the recording")
                return access.data
        return None

    def read_unrecorded(self, address: int, size: int) -> bytes:
        """The bytes there, as far as other accesses tell. Raises `GuestMemoryError`."""
        later = (access for _, access in self.pending if not access.write)
        data = composed((*reversed(self.past), *later), address, size)
        error = None if data is not None else _UNKNOWN
        access = MemoryAccess(self.event.vm, self.event.seq, address, size, data, False, error)
        self._make(access)
        if data is None or self._strict:
            self.differ("read", self._expected(access), describe(access))
        if data is None:
            raise GuestMemoryError(address, _UNKNOWN)
        return data

    @property
    def has_too_many(self) -> bool:
        """Whether it has made more accesses than are kept."""
        past = self._past
        return past is not None and len(past) == past.maxlen

    @property
    def latest_accesses(self) -> tuple[MemoryAccess, ...]:
        """The last ones that were made now."""
        return tuple(self._past or ())[-_SHOWN:]

    def take_write(self, address: int, data: bytes) -> bool | None:
        """`True`: this was written then; `None`: it was not, as far as is known yet.

        Raises `GuestMemoryError` for a write that failed then.
        """
        for place, (number, access) in enumerate(self.pending):
            if (
                access.write
                and access.address == address
                and access.size == len(data)
                and access.data in (data, None)
            ):
                self._take(place, number, access)
                if access.error is not None:
                    raise GuestMemoryError(address, access.error)
                return True
        return None

    def write_unrecorded(self, address: int, data: bytes) -> None:
        """It was not written then."""
        access = MemoryAccess(self.event.vm, self.event.seq, address, len(data), data, True)
        self._make(access)
        self.differ("write", self._expected(access), describe(access))

    def differ(self, field: str, expected: str, got: str) -> None:
        """Note a difference; the first 64 are kept."""
        if expected != got:
            self._add(FieldDifference(field, expected, got))

    def _add(self, difference: FieldDifference) -> None:
        if len(self._differences) < _MAX_FIELDS:
            self._differences = (*self._differences, difference)

    def leave_unchecked(self, why: str) -> None:
        """It cannot be compared; the first reason is kept."""
        self.unchecked = self.unchecked or why

    def leave_out(self, access: MemoryAccess) -> None:
        """A recorded access that is not made now."""
        if self._strict or access.write:
            self.differ("write" if access.write else "read", describe(access), "not made")

    def leave_out_pending(self) -> None:
        """Nor are those that were not made yet, but for those that others were made for."""
        for number, access in self._pending or ():
            if number not in self._told:
                self.leave_out(access)

    def _take(self, place: int, number: int, access: MemoryAccess) -> None:
        if number > self._latest:
            self._latest = number
        elif self._strict:
            text = describe(access)
            self.differ("write" if access.write else "read", text, f"after others: {text}")
        del self.pending[place]
        self.held -= held_size(access)
        self._make(access, number)

    def _make(self, access: MemoryAccess, number: int | None = None) -> None:
        """An access is made; `number`: of the recorded one that it is."""
        self.past.append(access)
        if not self.keeps or self.has_too_many:
            return
        kept = self.kept
        # It stays where it was if it is not to come behind another one, that is made before it.
        if number is not None and kept.places[number] >= kept.latest:
            kept.latest = kept.places[number]
            kept.there.add(number)
        else:
            kept.others.append(access)
            kept.latest = self._place_of_new()

    @abstractmethod
    def _place_of_new(self) -> int:
        """Note that one is made which has its place here in the file, and return that."""

    def _expected(self, access: MemoryAccess) -> str:
        """What was made in the place of an access that was not recorded."""
        for number, then in self.pending:
            if then.write == access.write and number not in self._told:
                self._told |= {number}
                return describe(then)
        return f"no further {'write' if access.write else 'read'}"


def held_size(access: MemoryAccess) -> int:
    """Bytes that an access holds, its own fields included."""
    return 200 + (0 if access.data is None else len(access.data))
