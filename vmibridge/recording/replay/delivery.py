"""The traps of one VM on their way: given to the server, and answered.

A trap that waits for its answer is *unanswered*. With `order=vcpu` the traps of a vCPU wait for the
ones before them. A request that is answered WAIT now, and was not in the recording, asks again:
with the recorded retries, as far as they were read, and behind those with further ones, which have
numbers of their own.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import BackendError
from vmibridge.recording.replay.carried import CarriedTraps
from vmibridge.recording.replay.memory import ReplayedMemory
from vmibridge.recording.replay.open_requests import OpenRequests
from vmibridge.recording.replay.order import RecordedOrder
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import MADE, ReplayedRequest
from vmibridge.recording.replay.tally import Tally
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.backend import TrapSink, feed
from vmibridge.vm.trap import RegisterWrites, TrapEvent

__all__ = ["Delivery"]

_MAX_ASKED_ON = 10_000
"""Retries of a request that the recording does not have: what it waits for may never come."""


class Delivery:
    """See the module. `stop` ends the replay of this VM, when the server takes no more."""

    def __init__(
        self,
        walk: Walk,
        requests: OpenRequests,
        conductor: RecordedOrder,
        memory: ReplayedMemory,
        tally: Tally,
        stop: Callable[[], object],
        *,
        by_vcpu: bool,
    ) -> None:
        self.vcpus: set[int] = set()
        """Those that had a trap."""
        self.unanswered: dict[int, TrapEvent] = requests.unanswered
        self.has_server: bool = False
        """Whether what answers is in this process, and tells a tap."""
        self.wait: int | None = ServerSettings().wait.value1
        """`value1` of WAIT; `None`: no answer is known to be one."""
        self.sink: TrapSink
        self._open = requests.by_seq
        self._walk = walk
        self._requests = requests
        self._conductor = conductor
        self._memory = memory
        self._tally = tally
        self._stop = stop
        self._by_vcpu = by_vcpu
        self._busy: dict[int, deque[TrapEvent]] = {}
        self._carried = CarriedTraps()

    # --- to the server --------------------------------------------------------------

    def give_plain(self, event: TrapEvent) -> None:
        """A plain trap is on its way."""
        self.vcpus.add(event.vcpu)
        feed(self.sink, event, self._hold, self._refuse)

    def give(
        self, request: ReplayedRequest, event: TrapEvent, what: Awaited = Awaited.TAKEN
    ) -> None:
        """A trap of a request is on its way; the walk waits for `what` comes of it."""
        self.vcpus.add(event.vcpu)
        self.unanswered[event.seq] = event
        request.taken = request.told = request.parked = False
        if self._by_vcpu:
            queue = self._busy.get(event.vcpu)
            if queue is not None:
                queue.append(event)
                return
            self._busy[event.vcpu] = deque()
        # Where an agent carries it, no tap tells that it was taken. And a trap that asks again may
        # be given while the walk waits for something: that comes first.
        is_told = self.has_server or what is Awaited.ANSWERED
        if is_told and self._walk.awaited is None:
            self._walk.wait_for(request, what)
        self._put(event)

    def give_refused(self, request: ReplayedRequest, event: TrapEvent) -> None:
        """A retry is on its way that is to be answered WAIT at once, as in the recording."""
        self.vcpus.add(event.vcpu)
        self.unanswered[event.seq] = event
        request.refused = event.seq
        self._walk.wait_for(request, Awaited.REFUSED)
        self._put(event)

    def give_retry(self, request: ReplayedRequest, event: TrapEvent, place: int) -> None:
        """A recorded retry is on its way, which has that place in the file."""
        if request.is_forgotten:
            self._conductor.restart(request, event, place)
        self.give(request, event)

    def ask_on(self, request: ReplayedRequest) -> None:
        """One more retry, which the recording does not have: so it has a number of its own."""
        request.asked_on += 1
        self.give(request, self._requests.further_retry(request))

    def is_busy(self, vcpu: int) -> bool:
        """Whether with `order=vcpu` that vCPU has a trap which is not answered."""
        return vcpu in self._busy

    def abandon(self, seq: int) -> None:
        """The recorded guest did not wait for its answer."""
        self.sink.abandon(self._carried.carried(self.unanswered[seq]))

    def played(self, event: TrapEvent) -> TrapEvent:
        """The trap of the recording that this one carries."""
        return self._carried.played(event)

    def _put(self, event: TrapEvent) -> None:
        if not self.has_server:
            event = self._carried.carry(event, made_up=event.seq >> MADE != 0)
        feed(self.sink, event, self._hold, self._refuse)

    def _hold(self, event: TrapEvent) -> None:
        self._walk.feed_later(self.sink, event, self._refuse)

    def _refuse(self, event: TrapEvent) -> None:
        self._requests.unfold()
        self.unanswered.pop(self._carried.end(event).seq, None)
        self._stop()

    # --- answered -------------------------------------------------------------------

    def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """The server answers. Raises `BackendError` for a trap that waits for none."""
        if event is self._requests.plain:
            if writes is not None:
                return  # `answered` comes
            self._requests.unfold()
        event = self._carried.end(event)
        if event.seq not in self.unanswered:
            raise BackendError(f"trap {event.seq} was answered before, or never played")
        if writes is None or not self.has_server:
            # No tap sees one that is not ours, and none where an agent carries them.
            self.answer(event, None, writes)

    def answer(
        self, event: TrapEvent, outcome: Outcome[Any] | None, writes: RegisterWrites | None = None
    ) -> None:
        """A trap is answered: with an outcome, or where none is known with what is written."""
        self._requests.find(event.seq)
        if self.unanswered.pop(event.seq, None) is None:
            return
        if self._by_vcpu:
            queue = self._busy[event.vcpu]
            if queue:
                self._put(queue.popleft())
            else:
                del self._busy[event.vcpu]
        request = self._open.get(event.seq)
        if request is not None:
            is_refused, request.refused = request.refused == event.seq, None
            # It may have run natively: no tap saw it.
            request.taken = request.told = True
            if writes is not None:
                waits = request.is_told_to_wait(writes, self.wait)
            else:
                waits = outcome is not None and outcome.kind is OutcomeKind.WAITING
            request.outcome, request.writes = outcome, writes
            if waits and is_refused:
                request.told = False
            elif not (waits and not request.final_wait and self._asks_again(request)):
                request.answered = True
                self._conductor.answered(request)
                request.drop_retries()
                request.go_on()
                if request.over and (request.closes or self._by_vcpu):
                    self.close(request)
        self._walk.go()

    def _asks_again(self, request: ReplayedRequest) -> bool:
        """It is answered WAIT. `False`: it was so too often since the recorded answer."""
        if request.retries:
            self.give_retry(request, *request.retries.popleft())
        elif request.over and request.reply is not None:
            if self.has_server and request.asked_on >= _MAX_ASKED_ON:
                return False
            self.ask_on(request)
        elif not request.over:
            request.wants_retry = True
        return True

    def close(self, request: ReplayedRequest, why: str | None = None) -> None:
        """It is compared, or told to be unchecked with that reason, and forgotten."""
        self._requests.end(request)
        self._conductor.unwinds(request)
        self._memory.held -= request.held
        self._conductor.fetched.close(request)
        self._tally.close(request, why)
