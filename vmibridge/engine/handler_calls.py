"""The handlers of one request, one after the other, each in its turn and its place.

Handlers are other people's code. They may return what is no answer, raise anything, cancel the task
that they run in, or take no notice of being cancelled. Here each of that becomes an outcome.

Invariants
----------

- A handler that is suspended has a place in flight, and keeps it until it has unwound, also when
  the watchdog or a stop answers its trap before that. So handlers that do not end are bounded, too.
- Whether there is a place is tested before a handler is asked. It is taken when the handler is
  suspended (`HandlerCalls.take_place`), so one that never waits takes none. Between the two nothing
  else runs, so the place is still there.
- Nothing is begun for a request that was overtaken.
- Whatever a handler raises fails its trap, `SystemExit` and other exceptions that are no
  `Exception` included: a handler cannot end the server. `KeyboardInterrupt` fails its trap, too;
  it may be the user's, who pressed Ctrl-C while the handler ran, so the server is stopped
  (`on_interrupt`).
- When `HandlerCalls.ask` returns, the task of the worker has no cancellation left that is not its
  scope's, and no scope open that is the handler's; the async generators that it left are closed.
"""

from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any

import anyio

from vmibridge.aio.coroutines import forget_cancellation
from vmibridge.aio.generators import close_generators
from vmibridge.bridge.dispatch import Answer, Entry, ask, failure, outcome_of
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.engine.interruptions import is_being_cancelled, wait_again
from vmibridge.engine.loop_watch import Blocked
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.request import Cause, Request, State, Worker
from vmibridge.engine.watching import HandlerWatch, as_coroutine

# Asking an Enum for a member takes as long as a call before Python 3.12.
_UNMATCHED = OutcomeKind.UNMATCHED
CUT_OFF = "the handler was cancelled"
_LEFT_OPEN = "it left a cancel scope or a task group open"
_INLINE, _ENTERING, _QUEUED = State.INLINE, State.ENTERING, State.QUEUED
_QUEUE, _BEGIN = Cause.QUEUE, Cause.BEGIN


class HandlerCalls:
    """Calls handlers, and makes an outcome of whatever they do. See the module."""

    def __init__(
        self,
        in_flight: InFlight,
        turns: Turns,
        on_interrupt: Callable[[KeyboardInterrupt], None] | None,
        on_blocked: Callable[[Blocked], None],
        vm: str,
        watch: HandlerWatch | None = None,
    ) -> None:
        self.vm: str = vm
        """As `on_blocked`, for the watch of the loop, which finds both on the stack."""
        self.on_blocked: Callable[[Blocked], None] = on_blocked
        self._in_flight = in_flight
        self._turns = turns
        self._on_interrupt = on_interrupt
        # Of a tap that wants to know; else `None`, and a handler pays one test.
        self._watch = watch
        self._cancelled = anyio.get_cancelled_exc_class()
        # What a handler that was overtaken may leave. A group may hold the cancellation, which its
        # scope has to get back. Others end here, as those of any handler.
        self._left_to_the_scope = (Exception, self._cancelled, BaseExceptionGroup)

    def take_place(self, worker: Worker) -> None:
        """The handler is suspended, and was not queued before."""
        if not worker.request.entry.instant:
            self._in_flight.enter_nowait()
            worker.has_place = True

    def line_up(self, worker: Worker) -> None:
        """A request has got a task of its own, which is about to run."""
        if self._watch is not None:
            self._watch.queued(worker)

    async def ask(  # noqa: PLR0912, PLR0915 - each trap would pay for one more call
        self, worker: Worker, request: Request, entries: tuple[Entry, ...]
    ) -> Outcome[Any]:
        """What the first of them that does not pass comes to.

        Whatever it raises becomes the outcome. If the request was overtaken, the outcome means
        nothing, and what the handler raises passes through: its scope has been cancelled, and has
        to get its cancellation back.
        """
        packet, scope, watch = request.packet, worker.scope, self._watch
        # Nobody wants to know of its handler before that is suspended.
        is_plain = (
            watch is None
            or watch.is_quiet
            or (watch.order is not None and watch.order.plain is worker.context.event)
        )
        # In a task of its own it has been in the queue from the start.
        waited = request.state is _QUEUED
        try:
            for entry in entries:
                request.entry = entry
                try:
                    if (
                        entry.serial
                        or waited
                        or (not entry.instant and self._in_flight.full)
                        or (not is_plain and watch is not None and watch.lines_up(worker))
                    ):
                        found = await self._ask_in_turn(worker, request, entry)
                    else:
                        request.state = _INLINE
                        handler = entry.handler
                        if handler is None or not is_plain or (watch and watch.lined_up):
                            found = await self._ask(worker, entry)
                        elif watch is None:
                            # As `ask` does, without its call.
                            found = await handler.handle(worker.context, packet)
                        else:
                            # Most end with their first step, and need no coroutine that watches.
                            body = handler.handle(worker.context, packet)
                            if type(body) is not CoroutineType:
                                body = as_coroutine(body)
                            watch.taps.stepping = worker.context
                            try:
                                wish = body.send(None)
                            except StopIteration as end:
                                found = end.value
                            else:
                                found = await watch.rest_of(worker, body, wish)
                            finally:
                                watch.taps.stepping = None
                    if scope.begun:
                        await close_generators(scope, entry.name)
                    outcome = outcome_of(entry, packet, found)
                except BaseException as error:  # a handler may raise anything
                    if scope.begun:
                        await close_generators(scope, entry.name)
                    if request.is_overtaken and isinstance(error, self._left_to_the_scope):
                        raise
                    return self._outcome_of_error(worker, entry, error)
                if scope.current(scope.holder) is not scope.mark:
                    return self._outcome_of_error(worker, entry, RuntimeError(_LEFT_OPEN))
                if outcome.kind is not _UNMATCHED:
                    return outcome
                is_plain = watch is None
                waited = request.state is not _INLINE
                if waited and request.is_overtaken:
                    # A dispatcher that swallowed its cancellation: the next one must not begin.
                    return outcome
            return Outcome(OutcomeKind.UNMATCHED, packet)
        finally:
            # A handler may have cancelled the task of its worker, with or without being suspended
            # since. Left there, it would end what the worker waits for next: the reply.
            if (
                worker.task is not None
                and worker.task.cancelling()
                and not request.is_overtaken
                and not is_being_cancelled()
            ):
                await forget_cancellation(worker.task)
            if self._watch is not None and self._watch.lined_up:
                self._watch.lined_up.discard(worker)
            if worker.has_place:
                worker.has_place = False
                self._in_flight.leave()

    def _ask_in_turn(self, worker: Worker, request: Request, entry: Entry) -> Awaitable[Answer]:
        """Ask it when it is its turn and there is a place, as far as it needs them."""
        if request.state is not _QUEUED:
            request.on(_QUEUE)
        if entry.serial or self._in_flight.full or self._watch is not None:
            return self._wait_and_ask(worker, request, entry)
        # The usual case in a task of its own, without a coroutine that has nothing to wait for.
        if not worker.has_place and request.state is not _ENTERING:
            self._in_flight.enter_nowait()
            worker.has_place = True
        return self._begin(worker, request, entry)

    async def _wait_and_ask(self, worker: Worker, request: Request, entry: Entry) -> Answer:
        if self._watch is not None:
            self._watch.queued(worker)
            if (before := self._watch.turn(worker)) is not None:
                await before
        if entry.serial:
            assert entry.handler is not None
            # The turn before the place: a request that waits for its turn must not hold a place.
            turn = self._turns.of(entry.handler)
            try:
                await turn.acquire()
            except self._cancelled as error:
                await wait_again(error, turn.acquire)
            try:
                return await self._ask_in_place(worker, request, entry)
            finally:
                turn.release()
        return await self._ask_in_place(worker, request, entry)

    async def _ask_in_place(self, worker: Worker, request: Request, entry: Entry) -> Answer:
        # One that has waited takes its place now: `take_place` is called at the first wait only.
        if not worker.has_place and (request.state is not _ENTERING or self._in_flight.full):
            try:
                await self._in_flight.enter()
            except self._cancelled as error:
                await wait_again(error, self._in_flight.enter)
            worker.has_place = True
        if request.is_overtaken:
            # Between the hand-over of its turn and now. It must not begin.
            return None
        return await self._begin(worker, request, entry)

    def _begin(self, worker: Worker, request: Request, entry: Entry) -> Awaitable[Answer]:
        request.on(_BEGIN)
        return self._ask(worker, entry)

    def _ask(self, worker: Worker, entry: Entry) -> Awaitable[Answer]:
        if self._watch is None:
            return ask(entry, worker.context, worker.request.packet)
        return self._watch.ask(worker, entry)

    def _outcome_of_error(self, worker: Worker, entry: Entry, error: BaseException) -> Outcome[Any]:
        packet = worker.request.packet
        worker.scope.close_left()
        if isinstance(error, self._cancelled):
            # The worker was not cancelled: the handler raised it, or cancelled its own task.
            return Outcome(OutcomeKind.CANCELLED, packet, handler=entry.name, error=CUT_OFF)
        if isinstance(error, KeyboardInterrupt) and self._on_interrupt is not None:
            self._on_interrupt(error)
        return failure(entry, packet, error)
