"""The handler set of one VM: its handlers, loaded together, and the engine that runs them.

A VM has one current set. When handlers are reloaded another set follows it, and the set before
*retires*:

| a handler set | takes new requests | takes retries of what it told to wait | ends |
|---|---|---|---|
| current | yes | yes | with the guest, at a stop, or by itself |
| retired | no | yes | when it is quiet, or its uncollected results have expired |

*Quiet*: every trap that it was given is answered, and no request that it told to wait is without
its result. So no request is asked of two sets.

To its VM a set is what a `BridgeServer` is, with places, turns and shared handlers in common with
the sets of other VMs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import anyio

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.request import RetryKey, request_in, retry_key
from vmibridge.engine.engine import Engine
from vmibridge.engine.handshake import with_handshake
from vmibridge.engine.outcome_queue import OutcomeQueue
from vmibridge.engine.server import OUTCOMES_AHEAD
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Tap
from vmibridge.transport.server.backend import SessionBackend
from vmibridge.transport.server.shared_handlers import SharedHandlers
from vmibridge.transport.server.welcome import declared_reads, highest_timeout
from vmibridge.transport.session import Session
from vmibridge.transport.wire import WireRead
from vmibridge.vm.trap import TrapEvent, TrapFilter


class HandlerSet:
    """See the module. Raises `ValueError` as `BridgeServer` does.

    Before it is started, its shared handlers have to be entered (`SharedHandlers.use`), and its
    backend.
    """

    def __init__(
        self,
        session: Session,
        bridge: Bridge,
        settings: ServerSettings,
        taps: Sequence[Tap],
        shared: SharedHandlers,
    ) -> None:
        self.taps = taps
        self.handlers: list[BridgeHandler[Any]] = bridge.handlers
        self.backend: SessionBackend = SessionBackend(session.vm, session)
        self.filter: TrapFilter = bridge.trap_filter
        self.timeout: float = highest_timeout(bridge, settings)
        self.reads: list[WireRead] = declared_reads(bridge)
        self.ended: anyio.Event = anyio.Event()
        """No trap is answered by it any more."""
        self.done: anyio.Event = anyio.Event()
        """Nothing is left of it."""
        self._retired = False
        self._result_timeout = settings.result_timeout
        # Requests that were told to wait and still run are bounded by the places, results that are
        # kept by as many. One that expires is not reported: it stays until it is the oldest.
        self._max_waiting = 2 * settings.in_flight
        self._waiting: OrderedDict[int, RetryKey] = OrderedDict()
        """Requests that were told to wait, by the number of their first trap."""
        self._outcomes = OutcomeQueue(OUTCOMES_AHEAD)
        self._error: BaseException | None = None
        self._engine = Engine(
            self.backend,
            with_handshake(bridge, settings),
            settings,
            self._outcomes.add_producer(),
            shared.in_flight,
            shared.turns(),
            tuple(taps),
            self._on_end,
            is_interruptible=False,
        )

    # --- the run ----------------------------------------------------------------------

    @property
    def summary(self) -> Summary:
        """Counts so far, and how the guest ended."""
        return self._engine.summary

    def start(self) -> None:
        """Run, in the backend's task group. Once."""
        self.backend.tasks.start_soon(self._main)

    async def outcome(self) -> Outcome[Any]:
        """The next outcome. Raises `StopAsyncIteration` at the end, or the error it ended with."""
        outcome = await self._outcomes.get()
        self._keep_what_waits(outcome)
        return outcome

    def stop(self, *, now: bool = False) -> None:
        """As that of `BridgeServer`."""
        self._engine.stop(now=now)

    async def _main(self) -> None:
        try:
            await self._engine.main()
        finally:
            self._outcomes.end(self._error)

    def _on_end(self, vm: str, error: BaseException | None) -> None:
        self._error = error

    # --- when another set follows -----------------------------------------------------

    @property
    def _quiet(self) -> bool:
        return not self.backend.unanswered and not self._waiting

    def _keep_what_waits(self, outcome: Outcome[Any]) -> None:
        event = outcome.event
        assert event is not None
        if outcome.kind is OutcomeKind.WAITING:
            # A retry that is told to wait is of the same request: one entry, under its first trap.
            first = outcome.retry_of or event.seq
            self._waiting[first] = retry_key(event, outcome.packet)
            if len(self._waiting) > self._max_waiting:
                self._waiting.popitem(last=False)
        elif outcome.retry_of is not None:
            self._waiting.pop(outcome.retry_of, None)
        if self._retired and self._quiet:
            self.stop()

    def awaits(self, event: TrapEvent) -> bool:
        """Whether this may be a retry of a request that was told to wait here."""
        if not self._waiting:
            return False
        packet = request_in(event)
        return packet is not None and retry_key(event, packet) in self._waiting.values()

    async def retire(self) -> None:
        """Another set takes the new requests: end when this one is quiet."""
        self._retired = True
        if not self._quiet:
            # Results that no retry collects expire: until then a handler may run for as long as
            # its deadline, and its result is kept for as long as `result_timeout`.
            with anyio.move_on_after(self.timeout + self._result_timeout):
                await self.ended.wait()
        self.stop()
