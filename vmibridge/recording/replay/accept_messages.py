"""What the recording of new answers has, message by message (`accept`).

The recorded messages are gone through in their order, and what the journal has of each place stands
before the message of that place.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import (
    MemoryAccess,
    Note,
    Outside,
    RecordedMessage,
    Reply,
    Session,
    Step,
)
from vmibridge.recording.redaction import Redaction
from vmibridge.recording.replay.accepted import Accepted, AcceptedRequest
from vmibridge.recording.replay.journal import EventKind, JournalEvent
from vmibridge.text import counted
from vmibridge.vm.trap import TrapEvent

__all__ = ["accepted_messages"]

_CUT_OFF = (OutcomeKind.TIMEOUT, OutcomeKind.CANCELLED)
"""Replies behind which a handler may still make steps."""
_MAX_UNWINDING = 16_384
"""Such requests that are known at a time."""


def accepted_messages(
    messages: Iterable[TimedMessage], accepted: Accepted
) -> Iterator[tuple[int, RecordedMessage]]:
    """The messages of the new recording, with their times."""
    return _NewMessages(accepted).of(messages)


class _Open:
    """A request that is asked, as far as it was written."""

    def __init__(self, first: int, now: AcceptedRequest | None) -> None:
        self.first = first
        self.now = now
        """As it is accepted."""
        self.traps = {first}
        self.latest = first
        """The last one of them."""
        self.recorded = self.given = self.called = 0
        """Accesses of the recording, those of now, and calls of now, that were come to."""
        self.is_answered = False
        """Whether its final reply is written."""
        self.is_late = False
        """Whether the recorded one was come to, and that of now comes behind it."""
        self.is_restarted = False
        """Whether a trap that was a retry is the first one of it."""


class _NewMessages:
    """One pass over a recording."""

    def __init__(self, accepted: Accepted) -> None:
        self._accepted = accepted
        self._journal = accepted.journal
        self._vms = frozenset(accepted.journal.vms)
        self._open: dict[tuple[str, int], _Open] = {}
        self._unwinding: dict[tuple[str, int], None] = {}
        """Those of them whose recorded reply was come to, and whose handlers may make steps; and
        those that are answered WAIT, and perhaps never retried."""
        self._firsts: dict[tuple[str, int], int] = {}
        """From the retries of these to their first traps, and from traps that were answered WAIT
        to those that restart their requests."""
        self._redactions: dict[str, Redaction] = {}
        self._changes: dict[str, Counter[str]] = {}

    def of(self, messages: Iterable[TimedMessage]) -> Iterator[tuple[int, RecordedMessage]]:
        """All that the new recording has."""
        events = self._journal.events()
        event = next(events, None)
        place = last = 0
        given: list[tuple[int, RecordedMessage]] = []
        """The trap that was played last, with its note: it stands where it was taken."""
        for time, message in messages:
            if message.vm not in self._vms:
                yield from given
                given.clear()
                last = time
                yield time, message
                continue
            is_of_trap = isinstance(message, Note) and message.seq is not None
            while event is not None and event.place <= place and not is_of_trap:
                if given and event.kind is EventKind.TRAP and _is_trap(given[0][1], event):
                    last = given[-1][0]
                    yield from given
                    given.clear()
                last = min(max(last, event.time), given[0][0] if given else time)
                for each in self._of_event(event, message):
                    if _is_reply(each, message):
                        last = time
                    yield last, each
                event = next(events, None)
            if not is_of_trap:
                yield from given
                given.clear()
            now = [(time, each) for each in self._of_message(message, place)]
            if given or (isinstance(message, TrapEvent) and self._journal.is_asked(place)):
                given += now
            else:
                last = time
                yield from now
            place += 1
        yield from given

    # --- what has happened now ------------------------------------------------------

    def _of_event(self, event: JournalEvent, message: RecordedMessage) -> Iterator[RecordedMessage]:
        request = self._open.get((event.vm, event.first))
        now = None if request is None else request.now
        if now is not None and now.reply is None:
            return
        step = event.step
        if step is not None:
            yield step
        elif request is None or request.is_answered:
            return
        elif event.kind is EventKind.REPLY:
            yield from self._answer_elsewhere(event, request, message)
        elif now is None:
            return
        elif event.kind is EventKind.ACCESS:
            yield from self._accesses(request, request.given + 1)
        elif event.kind is EventKind.OUTSIDE:
            yield from self._calls(request, request.called + 1)

    def _answer_elsewhere(
        self, event: JournalEvent, request: _Open, message: RecordedMessage
    ) -> Iterator[RecordedMessage]:
        """A request was answered before the walk came to its reply, right then, or later."""
        if request.now is not None:
            if request.now.final in request.traps:
                yield from self._answer(request, None)
        elif isinstance(message, Reply) and self._first_of(message) == event.first:
            if message.vm == event.vm and message.kind is not OutcomeKind.WAITING:
                yield from self._answer(request, message)
        else:
            reply = self._accepted.moved(event.vm, event.first)
            if reply is not None and reply.seq in request.traps:
                yield from self._answer(request, reply)

    def _answer(self, request: _Open, reply: Reply | None) -> Iterator[RecordedMessage]:
        now = request.now
        if now is not None:
            # Where replies do not hold the walk, these may come later than the recorded one.
            yield from self._accesses(request, len(now.accesses))
            yield from self._calls(request, len(now.outside))
            reply = self._as_now(now.reply)
        request.is_answered = True
        if reply is not None:
            yield msgspec.structs.replace(reply, retry_of=None) if request.is_restarted else reply
            if request.is_late:
                self._end(request, reply)

    def _accesses(self, request: _Open, to: int) -> Iterator[RecordedMessage]:
        now = request.now
        assert now is not None
        for access in now.accesses[request.given : to]:
            request.given += 1
            data = None if "memory" in self._hidden(now.reply) else access.data
            # An access is made while a trap waits for its answer, and names that.
            yield msgspec.structs.replace(access, seq=request.latest, data=data)

    def _calls(self, request: _Open, to: int) -> Iterator[RecordedMessage]:
        now = request.now
        assert now is not None
        for call in now.outside[request.called : to]:
            request.called += 1
            yield call.without_content() if self._hidden(now.reply) else call

    # --- what is recorded -----------------------------------------------------------

    def _of_message(self, message: RecordedMessage, place: int) -> Iterator[RecordedMessage]:
        if isinstance(message, Session):
            self._redactions.setdefault(message.vm, Redaction(message.redaction))
            yield self._accepted.session(message)
        elif isinstance(message, Note):
            yield from self._of_note(message)
        elif isinstance(message, TrapEvent):
            yield from self._of_trap(message, place)
        elif isinstance(message, Reply):
            yield from self._of_reply(message, place)
        elif self._is_kept(message, place):
            yield self._as_asked(message)

    def _of_note(self, note: Note) -> Iterator[RecordedMessage]:
        if note.kind == "end":
            change = self._changes.get(note.vm or "", Counter())
            counts = {name: count + change[name] for name, count in note.counts.items()}
            yield msgspec.structs.replace(note, counts=counts, text=_total(counts, note))
            return
        vm, seq = note.vm or "", note.seq
        request = None
        if note.retry_of is not None:
            request = self._open.get((vm, self._firsts.get((vm, note.retry_of), note.retry_of)))
        if request is not None and seq is not None:
            self._unwinding.pop((vm, request.first), None)
            restarted = self._open.get((vm, seq)) if self._journal.is_restart(vm, seq) else None
            if restarted is not None and restarted is not request:
                self._restart(vm, request, restarted)
                return
            request.traps.add(seq)
            request.latest = seq
            self._firsts[vm, seq] = request.first
        now = self._accepted.request(note.vm, note.seq)
        if now is None or now.reply is not None:
            yield note

    def _restart(self, vm: str, before: _Open, request: _Open) -> None:
        """What the one request still has in the recording is of the other."""
        del self._open[vm, before.first]
        for seq in before.traps:
            self._firsts[vm, seq] = request.first
        request.traps |= before.traps
        request.recorded = before.recorded
        request.is_restarted = True

    def _of_trap(self, trap: TrapEvent, place: int) -> Iterator[RecordedMessage]:
        now = self._accepted.request(trap.vm, trap.seq)
        if self._journal.is_asked(place):
            self._open[trap.vm, trap.seq] = _Open(trap.seq, now)
        if now is not None and now.reply is None:
            return
        yield trap
        if self._journal.is_queued(place):
            yield Step(trap.vm, trap.seq, "queued")

    def _of_reply(self, reply: Reply, place: int) -> Iterator[RecordedMessage]:
        vm, first = reply.vm, self._first_of(reply)
        request = self._open.get((vm, first))
        now = self._accepted.request(vm, reply.seq)
        change = self._changes.setdefault(vm, Counter())
        if now is not None and now.reply is None:
            change[reply.kind.value] -= 1
            change["native"] += 1
            self._end(request, reply)
            return
        if now is not None and now.reply is not None and reply.seq == now.final:
            change[reply.kind.value] -= 1
            change[now.reply.kind.value] += 1
        elif reply.kind is OutcomeKind.WAITING and not self._is_moved(reply, first):
            yield reply
            if request is not None:
                self._keep_for_now((vm, request.first))
            return
        if request is None:
            yield reply
        elif not request.is_answered:
            request.is_late = self._journal.is_late(place)
            if request.is_late:
                return
            yield from self._answer(request, reply)
        self._end(request, reply)

    def _is_moved(self, reply: Reply, first: int) -> bool:
        """Whether it is the final one of its request, and given in another place now."""
        moved = self._accepted.moved(reply.vm, first)
        return moved is not None and moved.seq == reply.seq

    def _end(self, request: _Open | None, reply: Reply) -> None:
        """The recorded final reply of a request was come to."""
        if request is None:
            return
        key = reply.vm, request.first
        for seq in request.traps:
            self._firsts.pop((reply.vm, seq), None)
        if reply.kind in _CUT_OFF:
            self._keep_for_now(key)
        else:
            self._unwinding.pop(key, None)
            self._open.pop(key, None)

    def _keep_for_now(self, key: tuple[str, int]) -> None:
        self._unwinding[key] = None
        if len(self._unwinding) > _MAX_UNWINDING:
            oldest = next(iter(self._unwinding))
            del self._unwinding[oldest]
            request = self._open.pop(oldest, None)
            for seq in () if request is None else request.traps:
                self._firsts.pop((oldest[0], seq), None)

    def _is_kept(self, message: MemoryAccess | Outside | Step, place: int) -> bool:
        """Whether it is as it was."""
        request = self._open.get((message.vm, self._first_of(message)))
        if request is None or self._journal.has_ended(message.vm, place):
            now = self._accepted.request(message.vm, message.seq)
            return now is None or now.reply is not None
        now = request.now
        if now is not None and now.reply is None:
            return False
        if isinstance(message, Step):
            return message.kind == "parked" or not self._journal.has_steps(message.vm)
        if isinstance(message, Outside):
            # Behind its reply: of a handler that was cut off, and goes on all the same.
            if now is None:
                return True
            assert now.reply is not None
            if request.is_answered and now.reply.kind in _CUT_OFF:
                return True
            return (message.key, message.number) in now.made
        number = request.recorded
        request.recorded += 1
        return (now is None or number in now.there) and not request.is_answered

    def _as_asked(self, message: MemoryAccess | Outside | Step) -> RecordedMessage:
        """With the trap that it is of now."""
        request = self._open.get((message.vm, self._first_of(message)))
        if request is None or not request.is_restarted:
            return message
        return msgspec.structs.replace(message, seq=request.first)

    def _first_of(self, message: MemoryAccess | Outside | Step | Reply) -> int:
        """The trap that its request came with."""
        return self._firsts.get((message.vm, message.seq), message.seq)

    def _hidden(self, reply: Reply | None) -> frozenset[str]:
        redaction = None if reply is None else self._redactions.get(reply.vm)
        if reply is None or redaction is None:
            return frozenset()
        return redaction.of(reply.packet.request)

    def _as_now(self, reply: Reply | None) -> Reply | None:
        hidden = self._hidden(reply)
        if reply is None or not hidden:
            return reply
        writes = reply.writes
        if writes is not None:
            writes = self._redactions[reply.vm].writes(writes, hidden)
        error = None if reply.error is None else "left out"
        return msgspec.structs.replace(
            reply, writes=writes, output=None, output_sha256=None, error=error
        )


def _is_trap(message: RecordedMessage, event: JournalEvent) -> bool:
    """Whether the event is that this trap is taken."""
    if not isinstance(message, TrapEvent):
        return False
    return (message.vm, message.seq) == (event.vm, event.first)


def _is_reply(message: RecordedMessage, recorded: RecordedMessage) -> bool:
    """Whether it is the reply that is recorded there, which keeps its time."""
    if not isinstance(message, Reply) or not isinstance(recorded, Reply):
        return False
    return (message.vm, message.seq) == (recorded.vm, recorded.seq)


def _total(counts: dict[str, int], note: Note) -> str:
    if not counts:
        return note.text
    return counted(sum(counts.values()) - counts.get("native", 0), "trap")
