"""Asking: the handlers of one request, one after the other, each in its turn and its place.

Handlers are other people's code. They may return what is no answer, raise anything, cancel the task
that they run in, or take no notice of being cancelled. Here each of that becomes an outcome.

Invariants
----------

- A handler that is suspended has a place in flight, and keeps it until it has unwound, also when
  the watchdog or a stop answers its trap before that. So handlers that do not end are bounded, too.
- Whether there is a place is tested before a handler is asked. It is taken when the handler is
  suspended (`Asking.take_place`), so one that never waits takes none. Between the two nothing else
  runs, so the place is still there.
- Nothing is begun for a request that was overtaken.
- When `Asking.ask` returns, the task of the worker has no cancellation left that is not its
  scope's.
"""

import math
from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from vmibridge.aio.coroutines import forget_cancellation
from vmibridge.bridge.dispatch import Answer, Entry, ask, failure, outcome_of
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.request import Cause, Request, State, Worker

# Asking an Enum for a member takes as long as a call before Python 3.12.
_UNMATCHED = OutcomeKind.UNMATCHED
_INLINE, _ENTERING = State.INLINE, State.ENTERING
_QUEUE, _BEGIN = Cause.QUEUE, Cause.BEGIN


class Asking:
    """Asks handlers, and makes an outcome of whatever they do. See the module."""

    def __init__(
        self,
        in_flight: InFlight,
        turns: Turns,
        on_fatal: Callable[[BaseException], None],
        began: Callable[[Worker, Entry], None] | None = None,
    ) -> None:
        self._in_flight = in_flight
        self._turns = turns
        self._on_fatal = on_fatal
        # Of a tap that wants to know; else `None`, and a handler pays one test.
        self._began = began
        self._cancelled = anyio.get_cancelled_exc_class()
        # What a handler that was overtaken may leave. A group may hold the cancellation, which its
        # scope has to get back. Others, such as SystemExit, are meant for the server.
        self._left_to_the_scope = (Exception, self._cancelled, BaseExceptionGroup)

    def take_place(self, worker: Worker) -> None:
        """The handler is suspended, and was not queued before."""
        if not worker.request.entry.instant:
            self._in_flight.enter_nowait()
            worker.has_place = True

    async def ask(
        self, worker: Worker, request: Request, entries: tuple[Entry, ...]
    ) -> Outcome[Any]:
        """What the first of them that does not pass comes to.

        Whatever it raises becomes the outcome. If the request was overtaken, the outcome means
        nothing, and what the handler raises passes through: its scope has been cancelled, and has
        to get its cancellation back.
        """
        packet = request.packet
        waited = False
        try:
            for entry in entries:
                request.entry = entry
                try:
                    if entry.serial or waited or (self._in_flight.full and not entry.instant):
                        found = await self._ask_in_turn(worker, request, entry)
                    else:
                        request.state = _INLINE
                        if self._began is not None:
                            self._began(worker, entry)
                        found = await ask(entry, worker.context, packet)
                    outcome = outcome_of(entry, packet, found)
                except BaseException as error:  # a handler may raise anything
                    if request.is_overtaken and isinstance(error, self._left_to_the_scope):
                        raise
                    return self._outcome_of_error(entry, packet, error)
                if outcome.kind is not _UNMATCHED:
                    return outcome
                waited = request.state is not _INLINE
                if waited and request.is_overtaken:
                    # A dispatcher that swallowed its cancellation: the next one must not begin.
                    return outcome
            return Outcome(OutcomeKind.UNMATCHED, packet)
        finally:
            # A handler may have cancelled the task of its worker, with or without being suspended
            # since. Left there, it would end what the worker waits for next: the reply.
            if worker.task is not None and worker.task.cancelling() and not is_being_cancelled():
                await forget_cancellation(worker.task)
            if worker.has_place:
                worker.has_place = False
                self._in_flight.leave()

    async def _ask_in_turn(self, worker: Worker, request: Request, entry: Entry) -> Answer:
        """Wait for the handler's turn and for a place, as far as it needs them."""
        request.on(_QUEUE)
        if entry.serial:
            assert entry.handler is not None
            # The turn before the place: who waits for a turn keeps nobody else from a place.
            async with self._turns.of(entry.handler):
                return await self._ask_in_place(worker, request, entry)
        return await self._ask_in_place(worker, request, entry)

    async def _ask_in_place(self, worker: Worker, request: Request, entry: Entry) -> Answer:
        # One that has waited takes its place now: `take_place` is called at the first wait only.
        if not worker.has_place and (request.state is not _ENTERING or self._in_flight.full):
            await self._in_flight.enter()
            worker.has_place = True
        if request.state is not _ENTERING:
            # Overtaken between the hand-over of its turn and now, it must not begin.
            await checkpoint_if_cancelled()
        request.on(_BEGIN)
        if self._began is not None:
            self._began(worker, entry)
        return await ask(entry, worker.context, request.packet)

    def _outcome_of_error(
        self, entry: Entry, packet: BridgePacket, error: BaseException
    ) -> Outcome[Any]:
        if isinstance(error, self._cancelled):
            # Nobody has cancelled the worker: the handler raised it, or cancelled its own task.
            text = "the handler was cancelled"
            return Outcome(OutcomeKind.CANCELLED, packet, handler=entry.name, error=text)
        if not isinstance(error, Exception):
            # Such as SystemExit: the server goes down with it, in good order.
            self._on_fatal(error)
        return failure(entry.name, packet, error)


def is_being_cancelled() -> bool:
    """Whether a cancel scope around this was cancelled."""
    return anyio.current_effective_deadline() == -math.inf
