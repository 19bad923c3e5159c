"""Workers: from a trap that is ready to its answer.

Rules that they live by:

- Every trap is answered once: by its worker, when the handler ends, or in its place by
  the watchdog at a deadline, or by the shutdown. Those two find it in `_waiting`, and take
  the trap (`Worker.event`) or the whole worker out of there before they answer.
- A worker takes a ready trap and runs its handler inline. When the handler waits,
  another worker takes over the lanes (`_promote`), and the deadlines are armed: one
  watchdog for all, no cancel scope per trap. A handler that never waits can miss no
  deadline.
- At the soft deadline the guest is told to wait. The worker keeps the handler, without a
  trap; its request is *pending* until a retry has collected the result.
- At the hard deadline the guest gets its fallback at once; the handler is cancelled, and
  may take its time to unwind: it is cut off from the guest's memory.

| the worker has | soft deadline | hard deadline | the handler ends | shutdown |
|---|---|---|---|---|
| a trap, no place yet | WAIT; forgotten | fallback | | fallback |
| a trap | WAIT; loses the trap | fallback | answer | fallback |
| no trap | | fallback is kept | answer is kept | dropped |
"""

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from vmibridge.aio.coroutines import asyncio_task, forget_cancellation, run_inline
from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.dispatch import Answer, Bridge, Entry, ask, failure, outcome_of
from vmibridge.bridge.outcome import GONE, STOPPED, Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import is_guest_request, read_packet
from vmibridge.engine.lanes import Lanes
from vmibridge.engine.outcome_queue import OutcomesIn
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.policy import Guard, MeteredMemory
from vmibridge.engine.replies import BeforeResume, Replies
from vmibridge.engine.request import Worker
from vmibridge.engine.retries import PendingRequest, PendingRequests
from vmibridge.engine.settings import ServerSettings, Terms
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Tap, TappedMemory
from vmibridge.errors import UnsupportedTrapError
from vmibridge.vm.backend import Backend
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent, TrapFilter, TrapReason

log: logging.Logger = logging.getLogger(__name__)

_clock = time.monotonic
_deadline = attrgetter("deadline")

_MAX_IDLE = 1024
"""Idle workers that are kept; one costs about 4 KiB, and starting one three times a wake-up."""

# Asking an Enum for a member takes as long as a call before Python 3.12.
_UNMATCHED = OutcomeKind.UNMATCHED

_NO_16_BIT = "16-bit guest code has no register form in the bridge protocol"


class Workers:
    """The workers of one VM. See the module for their rules."""

    def __init__(
        self,
        backend: Backend,
        bridge: Bridge,
        settings: ServerSettings,
        outcomes: OutcomesIn,
        in_flight: InFlight,
        turns: Turns,
        taps: Sequence[Tap],
        on_fatal: Callable[[BaseException], None],
        before_resume: BeforeResume | None = None,
    ) -> None:
        self.summary: Summary = Summary()
        self.lanes: Lanes = Lanes(settings.queue, self._abandon)
        self.filter: TrapFilter = bridge.trap_filter
        self._backend = backend
        self._bridge = bridge
        self._settings = settings
        self._taps = taps
        self._replies = Replies(
            backend, settings, outcomes, self.lanes, self.summary, taps, before_resume
        )
        self._in_flight = InFlight(settings.in_flight, in_flight)
        self._turns = turns
        self._on_fatal = on_fatal
        self._guard: Guard | None = None
        self._memory: PhysicalMemory = TappedMemory(backend, taps) if taps else backend
        if settings.policy is not None:
            self._guard = Guard(settings.policy)
            if self._guard.meters_bytes:
                self._memory = MeteredMemory(self._memory, self._guard)
        self._terms: dict[tuple[Entry, int | None], Terms] = {}
        self._waiting: set[Worker] = set()
        self._pending: PendingRequests[Worker] = PendingRequests(
            settings.result_timeout, settings.in_flight, lambda worker: worker.event is not None
        )
        self._stopping = False
        self._guest_gone = False
        self._told = False
        self._wake_at = math.inf
        self._poke = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._cancelled = anyio.get_cancelled_exc_class()

    def start(self, tasks: TaskGroup) -> None:
        """Answer traps, in tasks of this group, until the lanes are closed and empty."""
        self._tasks = tasks
        tasks.start_soon(self._work)

    # --- one trap -------------------------------------------------------------------

    async def _work(self) -> None:
        worker = Worker()
        worker.task = asyncio_task()
        worker.on_wait = partial(self._worker_waits, worker)
        while True:
            try:
                with anyio.CancelScope() as worker.scope:
                    if not await self._answer_traps(worker):
                        return
            except self._cancelled:
                # On asyncio a handler can raise this without any scope that was cancelled.
                if worker.task is None or _is_being_cancelled():
                    raise
                await forget_cancellation(worker.task)
            except Exception:
                # A handler that was overtaken may end as it likes: its trap is answered.
                if not worker.overtaken:
                    raise
                log.debug("a handler raised while it was being cancelled", exc_info=True)
            except BaseExceptionGroup as error:
                # What a handler that was overtaken left, without the cancellations.
                if not worker.overtaken or _is_being_cancelled():
                    raise
                self._on_fatal(error)

    async def _answer_traps(self, worker: Worker) -> bool:
        """Answer traps while there are any; returns whether to go on with a new scope."""
        lanes = self.lanes
        worker.overtaken = False
        while not worker.overtaken:
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
            worker.event = event
            worker.entry = worker.pending = None
            worker.waited = worker.placed = worker.queued = False
            await run_inline(self._answer(worker, event), worker.on_wait)
        return True

    def _worker_waits(self, worker: Worker) -> None:
        if worker.entry is not None:
            if not worker.queued and not worker.entry.instant:
                self._in_flight.enter_nowait()
                worker.placed = True
            worker.waited = True
            terms = worker.terms = self._terms_of(worker.entry, worker.packet.method)
            worker.hard_deadline = worker.started + terms.timeout
            self._arm(worker)
        self._promote()

    def _arm(self, worker: Worker) -> None:
        worker.deadline = min(worker.hard_deadline, worker.started + worker.terms.soft_timeout)
        self._waiting.add(worker)
        if worker.deadline < self._wake_at:
            self._poke.set()

    def _promote(self) -> None:
        """See to it that a worker will take the next ready trap."""
        if not (self.lanes.wake() if self.lanes.has_ready else self.lanes.attended):
            assert self._tasks is not None
            self._tasks.start_soon(self._work)

    async def _answer(self, worker: Worker, event: TrapEvent) -> None:
        started = worker.started = _clock()
        gone = self.lanes.abandoned and self.lanes.was_abandoned(event)
        in_vain = GONE if gone else STOPPED if self._stopping else None
        packet = self._read_ours(event)
        if packet is None:
            return await self._replies.run_natively(event)
        if self._guard is not None:
            denied = self._guard.denies(event, started)
            if denied is not None:
                outcome: Outcome[Any] = Outcome(OutcomeKind.DENIED, packet, error=denied)
                return await self._replies.finish(event, started, outcome)
        entries = self._bridge.match(packet, event.reason)
        if in_vain:
            outcome = Outcome(OutcomeKind.CANCELLED, packet, error=in_vain)
        elif event.width == 16:
            # Told once: a guest may not fill the log.
            log.log(
                logging.DEBUG if self._told else logging.WARNING, "vm %s: %s", event.vm, _NO_16_BIT
            )
            self._told = True
            outcome = Outcome(OutcomeKind.FAILED, packet, error=_NO_16_BIT)
        elif not entries:
            outcome = Outcome(OutcomeKind.UNMATCHED, packet)
        elif self._pending and (
            request := self._pending.find(self._key(event, packet, entries[0]))
        ):
            retried = self._join(request, event, packet, started)
            if retried is None:
                return None
            outcome = retried
        else:
            worker.packet = packet
            worker.first = entries[0]
            worker.context = BridgeContext(event, self._memory)
            outcome = await self._ask(worker, entries)
            if worker.overtaken:
                return None
            worker.entry = None
            worker.context.close()
            if worker.waited:
                self._waiting.discard(worker)
                if worker.pending is not None:
                    return await self._end_pending(worker, worker.pending, outcome)
        return await self._replies.finish(event, started, outcome)

    def _read_ours(self, event: TrapEvent) -> BridgePacket | None:
        """The request of a trap that is ours, which taps are told of; `None` for others."""
        try:
            packet = read_packet(event)
        except (UnsupportedTrapError, ValueError):
            # A recording may have registers that no machine has.
            return None
        if not self.filter.wants(event.reason, packet.magic):
            return None
        if (
            self._backend.other_hypercalls
            and event.reason is not TrapReason.CPUID
            and not is_guest_request(event)
        ):
            return None
        for tap in self._taps:
            tap.trap(event)
        return packet

    async def _ask(self, worker: Worker, entries: tuple[Entry, ...]) -> Outcome[Any]:
        packet = worker.packet
        try:
            for entry in entries:
                worker.entry = entry
                try:
                    found = await (
                        self._ask_in_turn(worker, entry)
                        if entry.serial
                        or worker.waited
                        or (self._in_flight.full and not entry.instant)
                        else ask(entry, worker.context, packet)
                    )
                    outcome = outcome_of(entry, packet, found)
                except Exception as error:
                    if worker.overtaken:
                        raise
                    return failure(entry.name, packet, error)
                except self._cancelled:
                    if worker.overtaken:
                        raise
                    return Outcome(
                        OutcomeKind.CANCELLED,
                        packet,
                        handler=entry.name,
                        error="the handler was cancelled",
                    )
                except BaseException as error:
                    # A group may hold the cancellation, which is the scope's to take out.
                    if worker.overtaken and isinstance(error, BaseExceptionGroup):
                        raise
                    # Such as SystemExit: the server goes down with it, in good order.
                    self._on_fatal(error)
                    return failure(entry.name, packet, error)
                if outcome.kind is not _UNMATCHED:
                    return outcome
            return Outcome(OutcomeKind.UNMATCHED, packet)
        finally:
            if worker.task is not None and worker.task.cancelling() and not _is_being_cancelled():
                await forget_cancellation(worker.task)
            if worker.placed:
                self._in_flight.leave()

    async def _ask_in_turn(self, worker: Worker, entry: Entry) -> Answer:
        """Wait for the handler's turn and for a place, as far as it needs them."""
        worker.queued = True
        if entry.serial:
            assert entry.handler is not None
            async with self._turns.of(entry.handler):
                return await self._ask_in_place(worker, entry)
        return await self._ask_in_place(worker, entry)

    async def _ask_in_place(self, worker: Worker, entry: Entry) -> Answer:
        if not worker.placed and (worker.waited or self._in_flight.full):
            await self._in_flight.enter()
            worker.placed = True
        if worker.waited:
            # Answered for between its turn and now, it must not begin.
            await checkpoint_if_cancelled()
        worker.queued = False
        return await ask(entry, worker.context, worker.packet)

    # --- requests that were told to wait, and their retries -------------------------

    def _terms_of(self, entry: Entry, method: int) -> Terms:
        handler = entry.handler
        known = None if handler is None or method not in handler.methods else method
        terms = self._terms.get((entry, known))
        if terms is None:
            terms = self._terms[entry, known] = self._settings.terms(entry.target, method)
        return terms

    def _key(self, event: TrapEvent, packet: BridgePacket, entry: Entry) -> Hashable:
        """What a retry has in common with its request; the VM is that of these workers.

        The ring, too: what was begun for a program may not go on with a kernel's rights.
        """
        values = packet.values
        return (
            event.address_space,
            event.ring,
            packet.magic,
            packet.request,
            packet.method,
            *[values[at - 1] for at in self._terms_of(entry, packet.method).retry_values],
        )

    def _join(
        self,
        request: PendingRequest[Worker],
        event: TrapEvent,
        packet: BridgePacket,
        started: float,
    ) -> Outcome[Any] | None:
        """What a retry is answered at once; `None`: it waits with its worker now."""
        self.summary.retries += 1
        for tap in self._taps:
            tap.retried(event, request.seq)
        worker = request.running
        if worker is None:
            assert request.outcome is not None
            self._pending.remove(request)
            return msgspec.structs.replace(request.outcome, packet=packet, retry_of=request.seq)
        assert worker.entry is not None
        if worker.event is not None:
            return _told_to_wait(worker, packet)
        worker.event, worker.packet, worker.started = event, packet, started
        worker.context.attach(event)
        self._arm(worker)
        return None

    async def _end_pending(
        self, worker: Worker, request: PendingRequest[Worker], outcome: Outcome[Any]
    ) -> None:
        event, worker.event = worker.event, None
        if event is None:
            self._keep(request, outcome)
            return
        self._pending.remove(request)
        outcome = msgspec.structs.replace(outcome, packet=worker.packet, retry_of=request.seq)
        await self._replies.finish(event, worker.started, outcome)

    def _keep(self, request: PendingRequest[Worker], outcome: Outcome[Any]) -> None:
        if self._guest_gone:
            self._pending.remove(request)
            self.summary.uncollected += 1
            return
        self.summary.uncollected += self._pending.keep(request, outcome, _clock())
        if request.expires < self._wake_at:
            self._poke.set()

    # --- deadlines and shutdown: those that answer in the place of a worker ---------

    async def watch(self) -> None:
        """Keep the deadlines, until this is cancelled."""
        while True:
            now = _clock()
            due = [worker for worker in self._waiting if worker.deadline <= now]
            for worker in sorted(due, key=_deadline):
                if worker.hard_deadline <= now:
                    error = f"no answer within {worker.terms.timeout:g} s"
                    self._overtake(worker, OutcomeKind.TIMEOUT, error)
                else:
                    self._tell_to_wait(worker)
            self.summary.uncollected += self._pending.expire(now)
            self._wake_at = min(
                min((worker.deadline for worker in self._waiting), default=math.inf),
                self._pending.next_expiry,
            )
            self._poke = anyio.Event()
            with anyio.move_on_after(self._wake_at - now):
                await self._poke.wait()

    def _tell_to_wait(self, worker: Worker) -> None:
        """The soft deadline: answer WAIT, and let the handler go on."""
        event = worker.event
        assert event is not None
        if self._guest_gone:
            self._overtake(worker, OutcomeKind.CANCELLED, "the guest has ended")
            return
        outcome = _told_to_wait(worker, worker.packet)
        if worker.queued and worker.pending is None:
            # Nothing has begun that is worth keeping; so nothing piles up, either.
            self._answer_for(worker, outcome)
            return
        worker.event = None
        worker.deadline = worker.hard_deadline
        worker.context.park()
        if worker.pending is None:
            key = self._key(event, worker.packet, worker.first)
            worker.pending = self._pending.add(key, worker, event.seq)
        assert self._tasks is not None
        self._tasks.start_soon(
            self._finish_waiting, event, worker.started, outcome, worker.context, worker.deadline
        )

    async def _finish_waiting(
        self,
        event: TrapEvent,
        started: float,
        outcome: Outcome[Any],
        context: BridgeContext,
        until: float,
    ) -> None:
        # An access to guest memory that is under way has to end before the guest runs.
        with anyio.move_on_after(until - _clock()):
            await context.memory.settled()
        await self._finish_for(event, started, outcome)

    def _overtake(self, worker: Worker, kind: OutcomeKind, error: str) -> None:
        assert worker.entry is not None
        self._answer_for(
            worker,
            Outcome(
                kind,
                worker.packet,
                handler=worker.entry.name,
                error=error,
                retry_of=_retry_of(worker),
            ),
        )

    def _answer_for(self, worker: Worker, outcome: Outcome[Any]) -> None:
        """Answer in the place of a handler that runs, and cancel it."""
        self._waiting.discard(worker)
        worker.overtaken = True
        worker.context.close()
        worker.scope.cancel()
        event, worker.event = worker.event, None
        request = worker.pending
        if event is not None:
            if request is not None:
                self._pending.remove(request)
            assert self._tasks is not None
            self._tasks.start_soon(self._finish_for, event, worker.started, outcome)
        elif request is not None:
            if outcome.kind is OutcomeKind.TIMEOUT:
                self._keep(request, outcome)
            else:
                self._pending.remove(request)
                self.summary.abandoned += 1

    async def _finish_for(self, event: TrapEvent, started: float, outcome: Outcome[Any]) -> None:
        await self._replies.finish(event, started, outcome)
        self._promote()

    def _abandon(self, event: TrapEvent) -> None:
        for worker in [each for each in self._waiting if each.event is event]:
            self._overtake(worker, OutcomeKind.CANCELLED, GONE)

    def guest_ended(self) -> None:
        """No trap and no retry will come any more: what only waits for them is dropped."""
        self._guest_gone = True
        self.lanes.close()
        for worker in list(self._waiting):
            if worker.event is None:
                self._overtake(worker, OutcomeKind.CANCELLED, "the guest has ended")
        self.summary.uncollected += self._pending.drop_results()

    def take_no_more(self) -> None:
        """From here on traps are answered without asking anybody."""
        self._stopping = True
        self.lanes.close()

    def cancel(self) -> None:
        """Answer all that waits for a handler, and cancel the handlers."""
        self._replies.consult_no_more()
        for worker in list(self._waiting):
            self._overtake(worker, OutcomeKind.CANCELLED, STOPPED)


def _is_being_cancelled() -> bool:
    """Whether a cancel scope around this was cancelled."""
    return anyio.current_effective_deadline() == -math.inf


def _told_to_wait(worker: Worker, packet: BridgePacket) -> Outcome[Any]:
    """The outcome of a trap whose handler goes on."""
    entry = worker.entry
    assert entry is not None
    response = entry.contract.stamp(worker.terms.wait) if entry.stamps else worker.terms.wait
    return Outcome(OutcomeKind.WAITING, packet, response, entry.name, retry_of=_retry_of(worker))


def _retry_of(worker: Worker) -> int | None:
    return None if worker.pending is None else worker.pending.seq
