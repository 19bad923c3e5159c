"""One request of a recording, served again: what its handler did then, and does now.

A request is the trap that it came with and, where it was told to wait, the traps that asked
for it again: they share its memory accesses and its final reply.

| a handler now | gets | is a difference |
|---|---|---|
| reads what it read then | the recorded bytes | in a strict replay, in another order |
| reads something else, of bytes that it knew then | them | in a strict replay |
| reads what it did not know then | `GuestMemoryError` | yes |
| writes what it wrote then | what became of it then | in a strict replay, in another order |
| writes something else | success | yes |
| leaves out a read | | in a strict replay |
| leaves out a write | | yes |
| leaves out a call of `vmi.outside` | | yes |
"""

from collections import deque
from collections.abc import Callable, Sequence

import anyio
import msgspec

from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.request import request_in
from vmibridge.errors import GuestMemoryError
from vmibridge.recording.messages import MemoryAccess, Reply
from vmibridge.recording.replay.compare import (
    Difference,
    FieldDifference,
    describe,
    differing_fields,
    is_cut,
    is_same,
    reply_of,
)
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request_parts import KeptAccesses, RequestOutside, composed
from vmibridge.vm.conductor import ConductedEngine
from vmibridge.vm.trap import RegisterWrites, TrapEvent

_MAX_PAST = 64
"""Accesses that are kept when they are done, to tell of them and to read from."""
_MAX_KEPT = 100_000
"""The same, where all of them are to be accepted."""
_MAX_FIELDS = 64
_SHOWN = 16
MADE = 40
"""Bits of a number above which is how many retries of it were made up. A recording of a replay
has such numbers, too: so the next one follows the latest of its request."""
_UNKNOWN = "it is not in the recording"
CUT = "the recording lacks the end of its output"


class ReplayedRequest:
    """See the module."""

    # Most requests access no memory and are never told to wait: what only others need is a
    # default of the class until then.
    held: int = 0
    """Bytes in `pending`."""
    reply: Reply | None = None
    """The final one, once it was read."""
    over = False
    """Whether all that was recorded of it was read."""
    outcome: Outcome[object] | None = None
    """Its final one, now."""
    writes: RegisterWrites | None = None
    """Its answer now, where nothing else is known of it: a server elsewhere gave it."""
    answered = False
    blocked = False
    """Whether its handler waits for an access that was not read yet."""
    engine: "ConductedEngine | None" = None
    """What it is served by, where its handler is in this process."""
    asks_since: float | None = None
    """Since when its handler waits for a call of `vmi.outside` that was not read yet: by the clock
    of the loop."""
    reads = False
    """Whether it was given the access, and has not gone on yet."""
    wants_retry = False
    """Whether it was told to wait now, so that it needs the next retry."""
    asked_on = 0
    """How many retries of it there were that the recording does not have."""
    taken = False
    """Whether the server has taken its latest trap."""
    told = False
    """Whether that was answered, by WAIT or for good."""
    parked = False
    """Whether its soft deadline has passed then, as far as the recording was read."""
    begun = False
    """Whether its handler has begun, or lined up though it did not then."""
    ended = False
    """Whether it has ended."""
    queued = False
    """Whether its handler lined up then."""
    has_turn = False
    """Whether its handler is about to begin, and the recorded order was asked."""
    turns = 0
    """How often it has lined up."""
    turns_allowed = 0
    steps_made = 0
    """How often it went on, held or not."""
    steps_done = 0
    """How often it went on after it was suspended."""
    steps_allowed = 0
    last_step: "tuple[float, int] | None" = None
    """When it was given or went on: by the clock of the loop, and then, in nanoseconds."""
    cut = False
    """Whether its handler was cut off then, by the hard deadline."""
    closes = False
    """Whether it is compared as soon as it is answered."""
    throws = False
    """Whether it went on with an exception in that step."""
    free = False
    """Whether it goes on as it likes."""
    loose = False
    """The same for the next time."""
    final_wait = False
    """Whether WAIT was the last that it was told: its handler had not begun."""
    unchecked: str | None = None
    """Why it cannot be compared."""
    given: int | None = None
    """When the server took its first trap, by the clock of the recording; `None`: as then, or time
    is not that of the recording."""
    is_in_time = False
    """Whether its handler was cut off then, and is not now."""
    refused: int | None = None
    """A retry that is to be answered WAIT at once, because an earlier one is pending."""
    has_run = False
    """Whether its handler has begun now."""
    seqs: Sequence[int] = ()
    """Of the traps that asked again."""
    place: int = 0
    """That of its trap in the file, where it matters (`journal`); of the one that restarts it."""
    restarted_by: int | None = None
    """The retry that is its first trap now: the server had forgotten it."""
    reply_place: int | None = None
    """Where it was answered for good, if that was not where its reply is."""
    recorded_place = 0
    """Where that reply is."""
    _kept: "KeptAccesses | None" = None
    _is_passed_over = False
    _gate: "anyio.Event | None" = None
    _outside: "RequestOutside | None" = None
    _pending: "deque[tuple[int, MemoryAccess]] | None" = None
    _past: "deque[MemoryAccess] | None" = None
    _retries: "deque[tuple[TrapEvent, int]] | None" = None
    _differences: Sequence[FieldDifference] = ()
    _made: int | None = None
    _attached = 0
    _latest = -1

    def __init__(
        self,
        event: TrapEvent,
        time: int,
        *,
        strict: bool,
        keep: "Callable[[ReplayedRequest], int] | None" = None,
    ) -> None:
        """`strict`: the order of accesses counts; `keep` notes that one is made which has its place
        here, and returns that: then all that are made are kept."""
        self.event = event
        self.time = time
        self._strict = strict
        self.keeps: bool = keep is not None
        self._keep = keep

    @property
    def first(self) -> int:
        """The trap that it came with, or that restarts it."""
        return self.event.seq if self.restarted_by is None else self.restarted_by

    @property
    def outside(self) -> RequestOutside:
        """Its calls of `vmi.outside`."""
        if self._outside is None:
            self._outside = RequestOutside()
        return self._outside

    @property
    def is_forgotten(self) -> bool:
        """Whether it was answered WAIT before its handler had begun, so that the server does not
        know of it any more."""
        engine = self.engine
        return not self.has_run and engine is not None and not engine.is_watched(self.first)

    def restart(self, seq: int, place: int) -> None:
        """Its trap is another one, there in the file: what it does from now on is behind that."""
        self.place, self.restarted_by = place, seq
        if self.keeps:
            self.kept.latest = place

    @property
    def progress(self) -> tuple[int, ...]:
        """How far its handler is: for which trap it has made how many steps, calls of `vmi.outside`
        and accesses; of those as many as are kept."""
        return self.first, self.steps_made, self.outside.given, len(self._past or ())

    @property
    def has_outside(self) -> bool:
        """Whether it has, or had, such."""
        return self._outside is not None

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
    def retries(self) -> "deque[tuple[TrapEvent, int]]":
        """Traps that asked again then, and were not needed yet; with their places in the file."""
        if self._retries is None:
            self._retries = deque()
        return self._retries

    @property
    def needs_more(self) -> bool:
        """Whether it cannot go on before more of the recording is read: it is slower than then, and
        was told to wait before it was then, or it reads what it had not read by then."""
        return self.blocked or (self.wants_retry and not self.parked)

    @property
    def may_need_retry(self) -> bool:
        """Whether its handler may wait for a trap that asks again, to access guest memory."""
        return self.told and self.begun and not (self.ended or self.answered)

    @property
    def needs_behind(self) -> bool:
        """Whether its handler cannot go on before more of the recording is read: that, or it waits
        for a trap that asks again."""
        if self.needs_more:
            return True
        engine = self.engine
        return self.may_need_retry and engine is not None and engine.waits_for_retry(self.first)

    def may_not_call(self, what: Awaited) -> bool:
        """Whether its handler, if changed, may not ask for what there is for it from outside, or
        asks for what comes later. `what`: that is waited for."""
        if self._outside is None:
            return False
        return what is Awaited.FETCHED or (what is Awaited.RESUMED and bool(self._outside.waiting))

    def pass_over(self) -> bool:
        """It was waited for; whether that is to end, as it needs what is behind in the file."""
        self._is_passed_over = self.needs_behind
        return self._is_passed_over

    @property
    def is_passed_over(self) -> bool:
        """Whether it still needs that, so that it is not waited for again."""
        self._is_passed_over = self._is_passed_over and self.needs_behind
        return self._is_passed_over

    def gate(self) -> anyio.Event:
        """Set when it may go on, perhaps."""
        if self._gate is None:
            self._gate = anyio.Event()
        return self._gate

    def go_on(self) -> None:
        """Who waits at the gate looks again."""
        if self._gate is not None:
            self._gate.set()
            self._gate = None

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

    def drop_retries(self) -> None:
        """It is answered: no retry is needed."""
        self._retries = None

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
                    self.unchecked = "memory was left out of the recording"
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
            self.differ("read", self._next(), describe(access))
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
        self.differ("write", self._next(), describe(access))

    def differ(self, field: str, expected: str, got: str) -> None:
        """Note a difference; the first 64 are kept."""
        if expected != got:
            self._add(FieldDifference(field, expected, got))

    def _add(self, difference: FieldDifference) -> None:
        if len(self._differences) < _MAX_FIELDS:
            self._differences = (*self._differences, difference)

    def leave_out(self, access: MemoryAccess) -> None:
        """A recorded access that is not made now."""
        if self._strict or access.write:
            self.differ("write" if access.write else "read", describe(access), "not made")

    def further_retry(self) -> tuple[TrapEvent, int | None]:
        """One more retry, which the recording does not have, and the number of the one before it
        that was made up, too: it is answered."""
        latest = self.seqs[-1] if self.seqs else self.event.seq
        round_ = (latest >> MADE) + 1
        before = self._made
        number = self._made = (self.event.seq & ((1 << MADE) - 1)) | round_ << MADE
        self.seqs = (*(seq for seq in self.seqs if seq != before), number)
        return msgspec.structs.replace(self.event, seq=number), before

    def is_told_to_wait(self, writes: RegisterWrites, wait: int | None) -> bool:
        """Whether an answer, of which nothing else is known, is WAIT: its value1 is `wait`."""
        if wait is None or writes.values[0] != wait:
            return False
        # It may be the answer, as it was then.
        then = None if self.reply is None else self.reply.writes
        return then is None or then.values[0] != wait

    def compare(self, *, whole: bool) -> Difference | None:
        """What is not as it was, when both replies are known; `None`: nothing.

        Unless `whole`, texts are not compared: something of it was left out.
        """
        reply, outcome = self.reply, self.outcome
        assert reply is not None
        if outcome is None and self.writes is not None:
            now = msgspec.structs.replace(reply, writes=self.writes)
            for each in differing_fields(reply, now):
                self._add(each)
        elif outcome is None:
            self.differ("outcome", reply.kind.value, "not ours: it ran natively")
        elif not is_same(reply, outcome, whole=whole):
            now = reply_of(outcome, reply)
            for each in differing_fields(reply, now, outcome.output, whole=whole):
                self._add(each)
        if whole and outcome is not None and is_cut(reply):
            self.unchecked = self.unchecked or CUT
        for _, access in self._pending or ():
            self.leave_out(access)
        if self._outside is not None:
            self._differences = self._outside.compare(self._differences, strict=self._strict)
        if not self._differences:
            return None
        event = self.event
        return Difference(
            event.vm,
            event.vcpu,
            event.seq,
            self.time,
            request_in(event),
            tuple(self._differences),
            self.latest_accesses,
            reply.handler or (None if outcome is None else outcome.handler),
        )

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
        if self._keep is None or self.has_too_many:
            return
        kept = self.kept
        # It stays where it was if it is not to come behind another one, that is made before it.
        if number is not None and kept.places[number] >= kept.latest:
            kept.latest = kept.places[number]
            kept.there.add(number)
        else:
            kept.others.append(access)
            kept.latest = self._keep(self)

    def _next(self) -> str:
        return describe(self.pending[0][1]) if self.pending else "no further access"


def held_size(access: MemoryAccess) -> int:
    """Bytes that an access holds, its own fields included."""
    return 200 + (0 if access.data is None else len(access.data))
