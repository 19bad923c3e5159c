"""The last step of a trap: write the answer, tell of it, and let the vCPU's next trap in.

What an outcome gives the guest stands in the table of `outcome`. An answer that cannot be
written makes its outcome *failed*; the trap is done with in any case.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import anyio

from vmibridge.bridge.dispatch import one_line
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.registers import write_response
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.interruptions import forget_stale, wait_again
from vmibridge.engine.lanes import Lanes
from vmibridge.engine.outcome_queue import OutcomeProducer
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.vm_taps import Taps
from vmibridge.vm.backend import Backend
from vmibridge.vm.trap import RegisterWrites, TrapEvent

log: logging.Logger = logging.getLogger(__name__)

# Asking an Enum for a member takes as long as a call before Python 3.12.
_HANDLED, _DENIED = OutcomeKind.HANDLED, OutcomeKind.DENIED


_CUT_OFF = "cut off by a timer that a handler left open in this task"

BeforeResume: TypeAlias = Callable[[Outcome[Any]], Awaitable[None]]
"""What a consumer does with an outcome while the vCPU of its trap still stands still."""


class Replies:
    """The replies to the traps of one VM."""

    def __init__(
        self,
        backend: Backend,
        settings: ServerSettings,
        outcomes: OutcomeProducer,
        lanes: Lanes,
        summary: Summary,
        taps: Taps | None,
        clock: Callable[[], float],
        before_resume: BeforeResume | None = None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._outcomes = outcomes
        self._lanes = lanes
        self._summary = summary
        self._taps = taps
        self._ran_natively = None if taps is None else taps.ran_natively
        self._before_resume = before_resume
        self._cancelled = anyio.get_cancelled_exc_class()
        self._patience = settings.timeout
        self._consulted: set[anyio.CancelScope] = set()
        denied = "native" if settings.policy is None else settings.policy.denied
        self._denied_natively = denied == "native"
        # Of the others the response is in the outcome.
        self._responses: dict[OutcomeKind, BridgeResponse[Any] | None] = {
            OutcomeKind.UNMATCHED: None,
            OutcomeKind.DENIED: denied if isinstance(denied, BridgeResponse) else None,
            **dict.fromkeys(
                (
                    OutcomeKind.REJECTED,
                    OutcomeKind.TIMEOUT,
                    OutcomeKind.FAILED,
                    OutcomeKind.CANCELLED,
                ),
                settings.fallback,
            ),
        }

    async def finish(
        self,
        event: TrapEvent,
        started: float,
        outcome: Outcome[Any],
        *,
        vcpu_gone: bool = False,
    ) -> None:
        """Answer a trap that was taken at `started`, in seconds of the clock.

        `vcpu_gone`: the answer is not needed, so that it cannot be written is no failure.
        """
        kind, error = outcome.kind, outcome.error
        response = outcome.response
        if kind is not _HANDLED and kind in self._responses:
            response = self._responses[kind]
        writes: RegisterWrites | None = None
        if kind is not _DENIED or not self._denied_natively:
            writes = write_response(event, response)
        if self._before_resume is not None:
            await self._consult(
                self._before_resume,
                Outcome(
                    kind,
                    outcome.packet,
                    response,
                    outcome.handler,
                    error,
                    event,
                    None,
                    self._clock() - started,
                    outcome.retry_of,
                ),
            )
        try:
            await self._backend.resume(event, writes)
        except Exception as lost:
            writes = None
            if not vcpu_gone:
                log.exception("the answer to trap %d of vm %s was not written", event.seq, event.vm)
                kind, error = OutcomeKind.FAILED, f"not written: {one_line(lost)}"
        except self._cancelled as cut:
            await forget_stale(cut)
            log.warning("the answer to trap %d of vm %s: %s", event.seq, event.vm, _CUT_OFF)
            writes, kind, error = None, OutcomeKind.FAILED, f"not written: {_CUT_OFF}"
        self._summary.outcomes[kind] += 1
        done: Outcome[Any] = Outcome(
            kind,
            outcome.packet,
            response,
            outcome.handler,
            error,
            event,
            writes,
            self._clock() - started,
            outcome.retry_of,
        )
        if self._taps is not None and self._taps.answered(done):
            try:
                await self._taps.room()
            except self._cancelled as cut:
                await wait_again(cut, self._taps.room)
        if not self._outcomes.put_nowait(done):
            try:
                await self._outcomes.put(done)
            except self._cancelled as cut:
                await wait_again(cut, partial(self._outcomes.put, done))
        self._lanes.release(event.vcpu)

    async def _consult(self, before_resume: BeforeResume, outcome: Outcome[Any]) -> None:
        """Let the consumer act first. Whatever it does, the answer is written after it."""
        assert outcome.event is not None
        where = f"before_resume of trap {outcome.event.seq} of vm {outcome.event.vm}"
        with anyio.move_on_after(self._patience) as scope:
            self._consulted.add(scope)
            try:
                await before_resume(outcome)
            except Exception:
                log.exception("%s failed; the answer is written anyway", where)
            except self._cancelled as cut:
                await forget_stale(cut)
                log.warning("%s: %s; the answer is written anyway", where, _CUT_OFF)
            finally:
                self._consulted.discard(scope)
        if scope.cancelled_caught:
            log.error("%s was cut off; the answer is written anyway", where)

    def consult_no_more(self) -> None:
        """Cut off what the consumer does, from here on: the server stops, and every trap is due."""
        self._before_resume = None
        for scope in self._consulted:
            scope.cancel()

    async def run_natively(self, event: TrapEvent) -> None:
        """Answer a trap that is not ours."""
        self._summary.native += 1
        try:
            await self._backend.resume(event, None)
        except Exception:
            log.exception("trap %d of vm %s did not run natively", event.seq, event.vm)
        except self._cancelled as cut:
            await forget_stale(cut)
            log.warning(
                "trap %d of vm %s, which is to run natively: %s", event.seq, event.vm, _CUT_OFF
            )
        else:
            if self._ran_natively is not None:
                self._ran_natively(event)
        self._lanes.release(event.vcpu)
