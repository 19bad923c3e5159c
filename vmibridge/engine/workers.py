"""Workers: take a trap that is ready, find who answers it, and run the handler inline.

Most handlers answer without waiting. To start a task for each would cost more than the handler,
so a worker is a task that steps the handler's coroutine itself (`run_inline`). Only when the
handler is about to be suspended does the worker do what waiting calls for: it takes a place, has
the deadlines armed, and *promotes*, which is to wake or to start another worker for the next
ready trap.

What waits is to have a task of its own, as any task has: libraries key sessions, timers and locks
on the task, callbacks wait for its end, and tools show its name and its stack. A coroutine cannot
go over to another task once it is suspended. So:

| a method | its handler runs | its task |
|---|---|---|
| has never been seen to wait | inline, in the task of a worker | takes the next trap |
| waits for the first time | goes on in that task | *retires*: it ends with that trap |
| was seen to wait | in a task of its own, from its start | ends with that trap |
| of a handler with `own_task = False` | inline, waiting or not | takes the next trap |

In a task of its own a request is in the queue from the start: `ENTERING` until the task runs, then
`QUEUED`, and `HandlerCalls` lets it in.

Here are the tasks, and the way of one trap. How handlers are called is in `handler_calls`, the
states of a request are in `request`, what may answer in the place of a worker is in `deadlines`,
and what a retry gets is in `retries`.

Invariants
----------

- While a trap is ready, a worker is on its way to it.
- A trap that a worker took is answered by that worker, unless the request was overtaken, or the
  trap was a retry and waits with another worker. Nothing that a handler does changes that:
  whatever it raises, groups and `SystemExit` included, becomes an outcome.
- The answer of a worker is never cut off: a scope is cancelled by overtaking only, which takes the
  trap first, and a request is not watched any more when its worker answers.
- A cancellation that a handler left in the task ends with its trap: the worker takes it back. So
  does a scope that it left open.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio.clock import loop_clock
from vmibridge.aio.coroutines import asyncio_task, run_inline
from vmibridge.aio.generators import watch_generators
from vmibridge.aio.handler_scope import AsyncioHandlerScope
from vmibridge.aio.loops import handler_scopes
from vmibridge.aio.own_tasks import OwnTasks, own_tasks, starter
from vmibridge.bridge.context import BridgeContext, Source
from vmibridge.bridge.dispatch import Bridge, Entry
from vmibridge.bridge.outcome import GONE, STOPPED, Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import own_request
from vmibridge.engine.access_policy import Guard, MeteredMemory
from vmibridge.engine.deadlines import Deadlines
from vmibridge.engine.handler_calls import CUT_OFF, HandlerCalls
from vmibridge.engine.interruptions import forget_undelivered, is_the_handlers
from vmibridge.engine.lanes import Lanes
from vmibridge.engine.loop_watch import Blocked
from vmibridge.engine.outcome_queue import OutcomeProducer
from vmibridge.engine.outside import outside_for
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.queue_time import lanes_for
from vmibridge.engine.reloading import StillRunning
from vmibridge.engine.replies import BeforeResume, Replies
from vmibridge.engine.request import WATCHED, Cause, Request, State, Worker
from vmibridge.engine.retries import Retries, as_retry
from vmibridge.engine.settings import ServerSettings, TermsTable
from vmibridge.engine.summary import Summary
from vmibridge.engine.tapped_memory import TappedMemory
from vmibridge.engine.vm_taps import Taps
from vmibridge.engine.watching import source_for, watch_for
from vmibridge.vm.backend import Backend
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds that a handler has to unwind after it was cancelled, on asyncio; at most a quarter of
`stop_timeout`. Then it is cancelled once more, and after as long again at each await."""
_AT_ONCE = 16
"""Workers that are started together on trio, where as many traps are ready."""
_MAX_IDLE = 1024
"""Idle workers that are kept; one costs about 4 KiB, and starting one three times a wake-up."""

# Asking an Enum for a member takes as long as a call before Python 3.12.
_TAKEN, _INLINE, _ANSWERED = State.TAKEN, State.INLINE, State.ANSWERED
_RUNNING, _PARKED, _RETRIED, _JOINED = State.RUNNING, State.PARKED, State.RETRIED, State.JOINED

_NO_FORM = "guest code has no register form in the bridge protocol"


class Workers:
    """The workers of one VM. See the module."""

    def __init__(
        self,
        backend: Backend,
        bridge: Bridge,
        settings: ServerSettings,
        outcomes: OutcomeProducer,
        in_flight: InFlight,
        turns: Turns,
        taps: Taps | None,
        on_interrupt: Callable[[KeyboardInterrupt], None] | None,
        before_resume: BeforeResume | None = None,
    ) -> None:
        self.summary: Summary = Summary()
        clock = self._clock = loop_clock()
        conductor = backend.conductor
        stepped = None if taps is None else taps.handler_stepped
        self.lanes: Lanes
        self.lanes, began = lanes_for(taps, settings.queue, self._abandon, clock)
        self.filter: TrapFilter = bridge.trap_filter
        self._backend = backend
        self._bridge = bridge
        self._taps = taps
        self._terms = TermsTable(settings)
        self._replies = Replies(
            backend, settings, outcomes, self.lanes, self.summary, taps, clock, before_resume
        )
        self._retries = Retries(settings, self._terms, self.summary, taps, conductor)
        self.deadlines: Deadlines = Deadlines(
            self._replies, self._retries, self.summary, self._promote, clock, stepped, conductor
        )
        if conductor is not None:
            conductor.conduct(self.deadlines)
        watch = watch_for(taps, began, conductor)
        self._calls = HandlerCalls(
            InFlight(settings.in_flight, in_flight),
            turns,
            on_interrupt,
            self._was_blocked,
            backend.vm,
            watch,
        )
        self._patience = min(_PATIENCE, settings.stop_timeout / 4)
        self._handler_scope = handler_scopes(self._patience)
        outside = outside_for(taps, conductor, watch)
        self.source: Source = source_for(conductor, clock, outside)
        self._guard: Guard | None = None
        self._memory: PhysicalMemory = backend if taps is None else TappedMemory(backend, taps)
        if settings.policy is not None:
            self._guard = Guard(settings.policy)
            if self._guard.meters_bytes:
                self._memory = MeteredMemory(self._memory, self._guard, clock)
        # Not asked for when something was raised: a task may be closed when its loop is gone.
        self._cancelled = anyio.get_cancelled_exc_class()
        self._stopping = self._cancelling = self._logged_narrow = False
        self._narrowest = backend.architecture.narrowest
        self._start: Callable[[], object]
        self._starting = 0  # workers of trio that have not run yet
        self._own_tasks: OwnTasks | None = None
        self._all: set[Worker] = set()
        self._on_wait = self._suspended  # once: each worker would have its own

    def start(self, tasks: TaskGroup) -> None:
        """Answer traps, in tasks of this group, until the lanes are closed and empty.

        The group does not end before `guest_ended`.
        """
        self._start, self._own_tasks = starter(tasks, self._work), own_tasks(tasks)
        watch_generators()
        self.deadlines.start(tasks)
        self._promote()

    # --- the tasks ------------------------------------------------------------------

    async def _work(self) -> None:
        """One worker. Ends when no trap is left, or when there are idle ones enough."""
        self._starting = max(0, self._starting - 1)
        worker = Worker()
        # On trio it is asked for in vain, at the price of an error.
        worker.task = None if self._own_tasks is None else asyncio_task()
        worker.has_place = worker.retires = False
        self._all.add(worker)
        try:
            while not worker.retires:
                try:
                    # A scope that was cancelled stays cancelled, so a worker that was overtaken
                    # gets another one: together with another request, because the old one may be
                    # kept for a retry.
                    with self._handler_scope() as worker.scope:
                        worker.request = Request(worker)
                        goes_on = await self._answer_traps(worker)
                    await forget_undelivered(worker.task)
                    if not goes_on:
                        return
                except BaseException as error:
                    if not await is_the_handlers(worker, error, self._cancelled):
                        raise
        finally:
            self._all.discard(worker)
            # Else a circle, which only the garbage collector would end.
            worker.request.worker = None
        if self._own_tasks is None and self.lanes.ready > self._starting and not self.lanes.idle:
            # One for each: waiting for one worker, those of a turn would sleep and wake in waves.
            self._starting += 1
            self._start()
        elif self.lanes.has_ready:
            self._promote()

    async def _answer_traps(self, worker: Worker) -> bool:
        """Answer traps while there are any; returns whether to go on with a new scope."""
        lanes, request, on_wait = self.lanes, worker.request, partial(self._on_wait, worker)
        while True:
            event = lanes.get_nowait()
            if event is None:
                if lanes.idle >= _MAX_IDLE:
                    return False
                event = await lanes.get()
                if event is None:
                    return False
            if self._stopping and self._backend.give_back(event):
                lanes.release(event.vcpu)
                continue
            request.event = event
            request.state = _TAKEN
            if await run_inline(self._answer(worker, request, event), on_wait):
                if worker.retires:
                    return True
                request = worker.request = Request(worker)
                continue
            if request.state is not _ANSWERED and request.state is not _JOINED:
                # Overtaken, or kept for a retry: another task may have this request now.
                return True

    def _suspended(self, worker: Worker) -> None:
        """The worker is about to be suspended, for the first time at this trap."""
        request = worker.request
        # Else no handler makes it wait, but the backend or the consumer: a reply has no deadline.
        if request.state is not _ANSWERED:
            if request.entry.own_task:
                worker.retires = True
                method = request.packet.method
                name = request.first.task_name(method)
                worker.scope.rename(name)
                # Tasks of trio begin in any order, and handlers are to begin in that of their
                # traps, which a replay relies on: there each begins inline, and retires.
                if worker.task is not None and request.state is _INLINE:
                    request.first.waits[request.first.key_of(method)] = name
            if request.state is _INLINE:
                request.state = _RUNNING
                # Not before: a handler that never waits overlaps with no other, and needs none.
                self._calls.take_place(worker)
            else:
                request.on(Cause.SUSPEND)
            self.deadlines.arm(request, self._terms.of(request.entry, request.packet.method))
        self._promote()

    def _promote(self) -> None:
        """See to it that a worker will take the next ready trap."""
        lanes = self.lanes
        if self._starting or (lanes.wake() if lanes.has_ready else lanes.attended):
            return
        count = 1
        if self._own_tasks is None:
            # Each trap whose handler waits needs one, and each start takes a turn of trio's loop.
            # Whichever of them runs first takes the first trap.
            count = self._starting = min(max(1, lanes.ready), _AT_ONCE)
        for _ in range(count):
            self._start()

    # --- one trap -------------------------------------------------------------------

    async def _answer(  # noqa: PLR0912 - each trap would pay for one more call
        self, worker: Worker, request: Request, event: TrapEvent
    ) -> bool:
        """Answer a trap; returns whether another task has it now, or this one retires."""
        # This is the hot path: each trap pays for what stands here, so it sets states without a
        # look-up. The state is ANSWERED before the reply is begun: from there on no other task may
        # answer, and when the reply has to wait, `_suspended` has no deadline to arm.
        started = request.started = self._clock()
        # Asked before anything else, and of all traps: this forgets that it was abandoned.
        gone = self.lanes.abandoned and self.lanes.was_abandoned(event)
        packet = own_request(event, self.filter, other_hypercalls=self._backend.other_hypercalls)
        if packet is None:
            request.state = _ANSWERED
            await self._replies.run_natively(event)
            return False
        if self._taps is not None:
            self._taps.trap(event, started)
        outcome: Outcome[Any]
        # The policy first: who is denied learns nothing of what is served, nor that it stops.
        if self._guard is not None and (denied := self._guard.denies(event, started)) is not None:
            outcome = Outcome(OutcomeKind.DENIED, packet, error=denied)
        elif gone or self._stopping:
            outcome = Outcome(OutcomeKind.CANCELLED, packet, error=GONE if gone else STOPPED)
            request.state = _ANSWERED
            await self._replies.finish(event, started, outcome, vcpu_gone=bool(gone))
            return False
        elif event.width < self._narrowest:
            outcome = self._refuse_narrow(event, packet)
        elif not (entries := self._bridge.match(packet, event.reason)):
            outcome = Outcome(OutcomeKind.UNMATCHED, packet)
        else:
            request.packet = packet
            pending = (
                self._retries.find(event, packet, entries[0])
                if self._retries.pending.by_key
                else None
            )
            if pending is None:
                first = request.first = entries[0]
                if first.waits and (name := first.waits.get(first.key_of(packet.method))):
                    self._hand_over(request, event, entries, name)
                    return True
                context = worker.context = BridgeContext(event, self._memory, self.source, started)
                outcome = await self._calls.ask(worker, request, entries)
                if request.state is not _INLINE:
                    # It has waited: the request may have another trap by now, or none.
                    late = self._end_late(request, context, outcome)
                    if late is None:
                        return worker.retires
                    assert request.event is not None
                    outcome, event, started = late, request.event, request.started
                context.close()
            else:
                joined = self._retries.join(pending, request)
                if joined is None:
                    # Its worker will answer this trap; this one goes on to the next.
                    self.deadlines.rearm(pending)
                    return False
                outcome = joined
        request.state = _ANSWERED
        await self._replies.finish(event, started, outcome)
        return worker.retires

    def _hand_over(
        self,
        request: Request,
        event: TrapEvent,
        entries: tuple[Entry, ...],
        name: str,
    ) -> None:
        """Have a request answered in a task of its own."""
        own = request.worker = Worker()
        own.request = request
        own.context = BridgeContext(event, self._memory, self.source, request.started)
        own.scope = scope = AsyncioHandlerScope(self._patience)
        own.has_place, own.retires = False, True
        self._all.add(own)
        request.entry = entries[0]
        request.on(Cause.QUEUE)
        self._calls.line_up(own)
        assert self._own_tasks is not None
        self._own_tasks.start(scope, self._answer_apart(own, entries), name)

    async def _answer_apart(self, worker: Worker, entries: tuple[Entry, ...]) -> None:
        """The task of one request."""
        request = worker.request
        outcome: Outcome[Any] | None = None
        # Watched from here on: a loop that is busy may take longer to begin a task than the soft
        # deadline, and a guest that was told to wait by then would start over each time.
        request.on(Cause.SUSPEND)
        self.deadlines.arm(request, self._terms.of(request.entry, request.packet.method))
        try:
            with worker.scope:
                worker.task = worker.scope.task
                # A stop that came since it was taken leaves it the grace period, as it does any
                # handler that has begun.
                if self._cancelling:
                    outcome = Outcome(OutcomeKind.CANCELLED, request.packet, error=STOPPED)
                else:
                    outcome = await self._calls.ask(worker, request, entries)
            await forget_undelivered(worker.task)
        except BaseException as error:
            if not await is_the_handlers(worker, error, self._cancelled):
                raise
        if outcome is None:
            outcome = Outcome(OutcomeKind.CANCELLED, request.packet, error=CUT_OFF)
        late = self._end_late(request, worker.context, outcome)
        if late is not None:
            assert request.event is not None
            worker.context.close()
            request.state = _ANSWERED
            await self._replies.finish(request.event, request.started, late)
        self._all.discard(worker)
        # Else a circle, which only the garbage collector would end.
        request.worker = None
        if self.lanes.has_ready:
            self._promote()

    def _end_late(
        self, request: Request, context: BridgeContext, outcome: Outcome[Any]
    ) -> Outcome[Any] | None:
        """The handler has ended after it had waited. `None`: no trap is there to be answered."""
        state = request.state
        if state is not _RUNNING and state not in WATCHED:
            # Overtaken: what the handler came to on its way out goes nowhere.
            return None
        self.deadlines.disarm(request)
        if state is _PARKED:
            request.on(Cause.END)
            request.take_worker()
            context.close()
            self.deadlines.keep(request, outcome)
            return None
        if state is _RETRIED:
            self._retries.pending.remove(request)
            return as_retry(outcome, request.packet, request.first_seq)
        return outcome

    def _refuse_narrow(self, event: TrapEvent, packet: BridgePacket) -> Outcome[Any]:
        # A warning once, so that a guest cannot flood the log.
        level = logging.DEBUG if self._logged_narrow else logging.WARNING
        error = f"{event.width}-bit {_NO_FORM}"
        log.log(level, "vm %s: %s", event.vm, error)
        self._logged_narrow = True
        return Outcome(OutcomeKind.FAILED, packet, error=error)

    def _was_blocked(self, blocked: Blocked) -> None:
        """A handler has held up the loop, which turns again."""
        self.summary.blocked += 1
        if self._taps is not None:
            self._taps.blocked(blocked)

    def replace(self, bridge: Bridge) -> StillRunning:
        """Ask `bridge` for each trap that is taken from here on. Returns who still runs."""
        self._bridge, self.filter = bridge, bridge.trap_filter
        self._terms.clear()
        return StillRunning(self._all)

    # --- the end --------------------------------------------------------------------

    def _abandon(self, event: TrapEvent) -> None:
        # The lanes are made before the deadlines, which need them.
        self.deadlines.abandon(event)

    def guest_ended(self) -> None:
        """No trap and no retry will come any more."""
        self.lanes.close()
        if self._own_tasks is not None:
            self._own_tasks.close()
        self.deadlines.guest_ended()

    def take_no_more(self) -> None:
        """From here on traps are answered without asking anybody."""
        self._stopping = True
        self.lanes.close()

    def cancel(self) -> None:
        """Answer all that waits for a handler, and cancel the handlers."""
        self._cancelling = True
        # First the consumer, who may hold answers that are due.
        self._replies.consult_no_more()
        self.deadlines.cancel()
