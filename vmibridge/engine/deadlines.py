"""Deadlines: a trap is answered in the place of the worker that handles it.

`Deadlines.watch` is the watchdog of one VM. It sleeps until the earliest deadline of all requests
that it watches, and is poked when an earlier one comes in. A request is watched from the first time
that its handler is suspended. A cancel scope with a deadline for each trap would cost more than all
the rest of its way; here a request that is answered in time pays for one entry in a dict.

| | has not begun (`QUEUED`) | runs, with a trap | runs, without a trap (`PARKED`) |
|---|---|---|---|
| soft deadline | WAIT; overtaken | WAIT; parked | |
| hard deadline | fallback; overtaken | fallback; overtaken | fallback is kept; overtaken |
| its vCPU is gone | overtaken | overtaken | |
| the guest has ended | | | abandoned |
| stop | fallback; overtaken | fallback; overtaken | abandoned |

To *overtake* a worker is to answer for it and to cancel it. The answer never waits for the
handler to unwind: that may take any time, and the guest stands still meanwhile.

Invariants
----------

- Only a request in a state of `request.WATCHED` is acted on, and the first thing done to it is
  its transition. So what comes second, a deadline or the end of the handler, finds it changed.
- From the decision to the trap in hand nothing is awaited. The answer is then written by a task of
  its own, in the engine's shielded task group, so that one slow write holds up no other deadline.
- A handler is cut off from guest memory before its guest runs again: `close` for good, `park`
  until a retry comes.
"""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio.loops import parking
from vmibridge.aio.parking import Parking
from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.outcome import GONE, STOPPED, Outcome, OutcomeKind, too_late
from vmibridge.engine.replies import Replies
from vmibridge.engine.request import Cause, Request, State, first_trap
from vmibridge.engine.retries import Retries, told_to_wait
from vmibridge.engine.settings import Terms
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Step, Stepped
from vmibridge.vm.conductor import Conductor, with_slack
from vmibridge.vm.trap import TrapEvent

_deadline = attrgetter("deadline")

_GUEST_ENDED = "the guest has ended"


class Deadlines:
    """The watchdog of one VM; `promote` sees to it that a worker takes the next ready trap."""

    def __init__(
        self,
        replies: Replies,
        retries: Retries,
        summary: Summary,
        promote: Callable[[], None],
        clock: Callable[[], float],
        stepped: Stepped | None,
        conductor: Conductor | None = None,
    ) -> None:
        self._replies = replies
        self._retries = retries
        self._summary = summary
        self._promote = promote
        self._clock = clock
        self._stepped = stepped
        self._conductor = conductor
        # In the order in which they came, so that those that are due together pass in that order.
        self._watched: dict[Request, None] = {}
        self._wake_at = math.inf
        self._poke: Parking | None = None
        self._guest_ended = False
        self._tasks: TaskGroup | None = None

    def start(self, tasks: TaskGroup) -> None:
        """Give the answers in tasks of this group."""
        self._tasks = tasks

    # --- what the workers say -------------------------------------------------------

    def arm(self, request: Request, terms: Terms) -> None:
        """Watch a request that was suspended for the first time, just now."""
        started = request.started
        request.terms = terms
        soft, hard = terms.soft_timeout, terms.timeout
        if self._conductor is not None:
            soft, hard = with_slack(soft), with_slack(hard)
        request.hard_deadline = started + hard
        request.deadline = deadline = min(request.hard_deadline, started + soft)
        self._watched[request] = None
        self._wake_by(deadline)

    def rearm(self, request: Request) -> None:
        """Watch a request that has another trap; its hard deadline stays."""
        soft = request.terms.soft_timeout
        if self._conductor is not None:
            soft = with_slack(soft)
        request.deadline = min(request.hard_deadline, request.started + soft)
        self._wake_by(request.deadline)

    def disarm(self, request: Request) -> None:
        """Its handler has ended, in time."""
        self._watched.pop(request, None)

    def keep(self, request: Request, outcome: Outcome[Any]) -> None:
        """Its handler has ended in time, and no trap is there to get the result."""
        self._retries.keep(request, outcome, self._clock())
        self._wake_by(self._retries.pending.next_expiry)

    # --- what a conductor says ------------------------------------------------------

    def tell_to_wait(self, first: int) -> bool:
        """Now is the soft deadline of the request that came with trap `first`. Returns whether it
        has a trap that waits."""
        for request in self._watched:
            if request.event is not None and _first_of(request) == first:
                self._tell_to_wait(request)
                return True
        return False

    def waits_for_retry(self, first: int) -> bool:
        """Whether the handler of that request waits for a retry, to access guest memory."""
        return any(
            request.worker.context.waits_for_retry
            for request in self._watched
            if request.worker is not None and _first_of(request) == first
        )

    def is_watched(self, first: int) -> bool:
        """Whether the handler of that request runs, or waits to begin."""
        return any(_first_of(request) == first for request in self._watched)

    def timeout_of(self, first: int) -> float | None:
        """The seconds of its hard deadline; `None`: it is not watched."""
        for request in self._watched:
            if _first_of(request) == first:
                return request.terms.timeout
        return None

    def allow(self, first: int, seconds: float) -> None:
        """Its hard deadline is in so many seconds."""
        for request in self._watched:
            if _first_of(request) == first:
                request.deadline = request.hard_deadline = self._clock() + seconds
                self._wake_by(request.deadline)

    def time_out(self, first: int) -> bool:
        """Now is its hard deadline. Returns whether its handler runs."""
        for request in self._watched:
            if _first_of(request) == first:
                self._overtake_late(request)
                return True
        return False

    def _wake_by(self, at: float) -> None:
        # Only for an earlier deadline: a poke costs two task switches, and with deadlines of
        # one length, the usual case, the first one that was armed stays the earliest.
        if at < self._wake_at and self._poke is not None:
            self._poke.wake()

    # --- the watchdog ---------------------------------------------------------------

    async def watch(self) -> None:
        """Act on the deadlines, until this is cancelled."""
        self._poke = parking()
        while True:
            now = self._clock()
            # The loop may have been held up: what is due is answered in the order of its deadlines.
            due = [request for request in self._watched if request.deadline <= now]
            for request in sorted(due, key=_deadline):
                if self._conductor is not None and (
                    later := self._conductor.postpones(_first_of(request))
                ):
                    request.deadline = now + later
                # The hard one first: where both have passed, there is nothing left to wait for.
                elif request.hard_deadline <= now:
                    self._overtake_late(request)
                elif self._guest_ended:
                    # No retry can come, so the handler would run on for no result.
                    self._overtake(request, Cause.CANCEL, OutcomeKind.CANCELLED, _GUEST_ENDED)
                else:
                    self._tell_to_wait(request)
            self._retries.expire(now)
            self._wake_at = min(
                min((request.deadline for request in self._watched), default=math.inf),
                self._retries.pending.next_expiry,
            )
            # Nothing was waited for since the deadlines were looked at: no poke was lost.
            await self._poke.wait_for(self._wake_at - now)

    def _tell_to_wait(self, request: Request) -> None:
        """The soft deadline: answer WAIT, and let the handler go on if it has begun."""
        self._tell(request, "parked")
        # Before the transition: it tells whether this trap was a retry.
        outcome = told_to_wait(request, request.packet)
        if request.state is State.QUEUED:
            # Nothing has begun that is worth keeping. To keep it all the same would let a guest
            # queue up as many as it likes.
            self._answer_for(request, Cause.SOFT_DEADLINE, outcome)
            return
        assert request.worker is not None
        assert self._tasks is not None
        context = request.worker.context
        event = self._retries.park(request)
        context.park()
        request.deadline = request.hard_deadline
        self._tasks.start_soon(
            self._finish_waiting, event, request.started, outcome, context, request.hard_deadline
        )

    async def _finish_waiting(
        self,
        event: TrapEvent,
        started: float,
        outcome: Outcome[Any],
        context: BridgeContext,
        until: float,
    ) -> None:
        # An access to guest memory that is under way in the backend has to end before the guest
        # runs: it was translated for a guest that stands still. But a VM whose memory hangs must
        # not hold the vCPU past its hard deadline.
        with anyio.move_on_after(until - self._clock()):
            await context.memory.settled()
        await self._finish(event, started, outcome)

    def _tell(self, request: Request, step: Step) -> None:
        if self._stepped is not None:
            assert request.worker is not None
            self._stepped(request.worker.context.event, _first_of(request), step)

    # --- overtaking -----------------------------------------------------------------

    def _overtake_late(self, request: Request) -> None:
        """The hard deadline."""
        self._tell(request, "cut off")
        error = too_late(request.terms.timeout)
        self._overtake(request, Cause.HARD_DEADLINE, OutcomeKind.TIMEOUT, error)

    def _overtake(
        self,
        request: Request,
        cause: Cause,
        kind: OutcomeKind,
        error: str,
        *,
        vcpu_gone: bool = False,
    ) -> None:
        """Answer with the fallback in the place of the worker, and cancel it."""
        outcome: Outcome[Any] = Outcome(
            kind,
            request.packet,
            handler=request.entry.name,
            error=error,
            retry_of=request.retry_of,
        )
        self._answer_for(request, cause, outcome, vcpu_gone=vcpu_gone)

    def _answer_for(
        self,
        request: Request,
        cause: Cause,
        outcome: Outcome[Any],
        *,
        vcpu_gone: bool = False,
    ) -> None:
        was_pending = request.retry_of is not None
        state = request.on(cause)
        self._watched.pop(request, None)
        worker = request.take_worker()
        # First the memory, then the cancellation: on its way out the handler may still run, and
        # what it reads then would be of a guest that runs again.
        worker.context.close()
        worker.scope.cancel()
        if state is State.KEPT:
            # Called by the watchdog only, which looks at the next expiry afterwards.
            self._retries.keep(request, outcome, self._clock())
            return
        if was_pending:
            self._retries.pending.remove(request)
        if state is State.ABANDONED:
            self._summary.abandoned += 1
            return
        assert self._tasks is not None
        self._tasks.start_soon(
            self._finish, request.take_trap(), request.started, outcome, vcpu_gone
        )

    async def _finish(
        self,
        event: TrapEvent,
        started: float,
        outcome: Outcome[Any],
        vcpu_gone: bool = False,
    ) -> None:
        await self._replies.finish(event, started, outcome, vcpu_gone=vcpu_gone)
        # The lane is free, so its next trap may be ready; the workers may all be suspended, and
        # only one that goes on would look.
        self._promote()

    # --- the shutdown ---------------------------------------------------------------

    def abandon(self, event: TrapEvent) -> None:
        """The vCPU of this trap is gone. A trap that no handler is at is left to its worker."""
        for request in [each for each in self._watched if each.event is event]:
            self._overtake(request, Cause.CANCEL, OutcomeKind.CANCELLED, GONE, vcpu_gone=True)

    def guest_ended(self) -> None:
        """No trap and no retry will come any more: what only waits for them is dropped.

        A handler that has a trap goes on: its answer is owed.
        """
        self._guest_ended = True
        for request in [each for each in self._watched if each.state is State.PARKED]:
            self._overtake(request, Cause.CANCEL, OutcomeKind.CANCELLED, _GUEST_ENDED)
        self._retries.expire(math.inf)

    def cancel(self) -> None:
        """Answer all that waits for a handler, and cancel the handlers."""
        for request in list(self._watched):
            self._overtake(request, Cause.CANCEL, OutcomeKind.CANCELLED, STOPPED)


def _first_of(request: Request) -> int:
    assert request.worker is not None
    return first_trap(request, request.worker)
