"""One request of a recording, served again: what its handler did then, and does now.

A request is the trap that it came with and, where it was told to wait, the traps that asked
for it again: they share its memory accesses and its final reply.

Its memory accesses are those of `RequestAccesses`; a call of `vmi.outside` that is left out is a
difference, too.
"""

from collections import deque
from collections.abc import Callable, Sequence

import anyio
import msgspec

from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.request import request_in
from vmibridge.recording.messages import Reply
from vmibridge.recording.replay.compare import (
    Difference,
    differing_fields,
    is_cut,
    is_same,
    reply_of,
)
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request_accesses import RequestAccesses
from vmibridge.recording.replay.request_parts import RequestOutside
from vmibridge.vm.conductor import ConductedEngine
from vmibridge.vm.trap import RegisterWrites, TrapEvent

MADE = 40
"""Bits of a number above which is how many retries of it were made up. A recording of a replay
has such numbers, too: so the next one follows the latest of its request."""
CUT = "the recording lacks the end of its output"


class ReplayedRequest(RequestAccesses):
    """See the module."""

    # Most requests access no memory and are never told to wait: what only others need is a
    # default of the class until then.
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
    _is_passed_over = False
    _gate: "anyio.Event | None" = None
    _outside: "RequestOutside | None" = None
    _retries: "deque[tuple[TrapEvent, int]] | None" = None
    _made: int | None = None

    def __init__(
        self,
        event: TrapEvent,
        time: int,
        *,
        strict: bool,
        keep: "Callable[[ReplayedRequest], int] | None" = None,
    ) -> None:
        """`time`: that of the trap; `strict`: the order of accesses counts; `keep` notes that one
        is made which has its place here, and returns that: then all that are made are kept."""
        super().__init__(event, strict=strict, keeps=keep is not None)
        self.time = time
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

    def drop_retries(self) -> None:
        """It is answered: no retry is needed."""
        self._retries = None

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
            self.leave_unchecked(CUT)
        self.leave_out_pending()
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

    def _place_of_new(self) -> int:
        assert self._keep is not None
        return self._keep(self)
