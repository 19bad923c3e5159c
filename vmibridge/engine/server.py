"""The server: backends and a bridge, brought together.

    async with open_backend("unicorn:guest.bin") as backend:
        server = BridgeServer(backend, Bridge(Hello()), timeout=5.0)
        async for outcome in server.run():
            ...

Rules:

- Each VM has an engine and handlers of its own. Handlers that say `shared` may serve
  several VMs; they are entered before the first of them runs, and left after the last.
- An engine lives in its backend's `async with`: leaving that answers whatever is
  pending, stops the guest, and only then goes on. The other VMs run on, unless it is
  the first backend of the server: that one is to be left last.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from threading import get_ident
from typing import Any, Self, TypeAlias

import anyio

from vmibridge.aio.lost_exceptions import lost_exceptions
from vmibridge.bridge.dispatch import Bridge, BridgeDispatch, Target, one_line
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.access_policy import Policy
from vmibridge.engine.engine import Engine
from vmibridge.engine.engines_health import health_of, reasons_of
from vmibridge.engine.handler_calls import HandlerCalls
from vmibridge.engine.handler_lives import CutOffError, Lives
from vmibridge.engine.handshake import with_handshake
from vmibridge.engine.loop_watch import LoopWatch
from vmibridge.engine.outcome_queue import OutcomeQueue
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.reloading import LaterHandlers, reload_each
from vmibridge.engine.replies import BeforeResume
from vmibridge.engine.settings import DEFAULTS, ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Hindrance, Tap, hindrance_of
from vmibridge.engine.until import Until, is_last_of
from vmibridge.errors import ServerStateError
from vmibridge.health.state import Reason
from vmibridge.vm.backend import Backend

__all__ = ["BridgeServer", "Run"]

log: logging.Logger = logging.getLogger(__name__)

OUTCOMES_AHEAD = 1024
"""Outcomes that are kept for a consumer that lags, before vCPUs wait for it."""


BridgeFactory: TypeAlias = Callable[[str], Target]
"""Makes what serves one VM, given the name of the VM."""


class BridgeServer:
    """Answers the traps of one or more backends with the handlers of a bridge.

    `bridge` is a bridge, a handler, or a function that makes one for the VM that it is
    given the name of. With several backends it has to be a function, so that each VM has
    handlers of its own; only handlers that say `shared` may be in more than one.

    The settings are the fields of `ServerSettings`, which says what each of them means; `taps`
    is what sees the traffic, such as a `Recorder`.

    An outcome is iterated over when its vCPU has gone on. Who has to act first, such as on an
    output with the guest still at its instruction, gives `before_resume`: it is awaited with
    the outcome of each trap of ours, whose `writes` are `None` then. The answer is written when
    it returns, when it raises (which is logged), after `timeout` seconds at the latest, and at
    a stop after the grace period: then it is cancelled.

    `timeout`, `soft_timeout`, `wait` and `retry_values` hold where neither the handler nor its
    method says otherwise. Raises `ValueError` for a number that is out of bounds, for two VMs of
    one name, and for a handler that two VMs would share without saying so.
    """

    def __init__(
        self,
        backends: Backend | Sequence[Backend],
        bridge: Target | BridgeFactory,
        *,
        timeout: float = DEFAULTS.timeout,
        soft_timeout: float | None = DEFAULTS.soft_timeout,
        wait: BridgeResponse[Any] = DEFAULTS.wait,
        retry_values: tuple[int, ...] = DEFAULTS.retry_values,
        result_timeout: float = DEFAULTS.result_timeout,
        fallback: BridgeResponse[Any] | None = None,
        queue: int = DEFAULTS.queue,
        in_flight: int = DEFAULTS.in_flight,
        in_flight_total: int = DEFAULTS.in_flight_total,
        grace: float = DEFAULTS.grace,
        stop_timeout: float = DEFAULTS.stop_timeout,
        policy: Policy | None = DEFAULTS.policy,
        handshake: bool = DEFAULTS.handshake,
        blocked_after: float = DEFAULTS.blocked_after,
        taps: Sequence[Tap] = (),
        before_resume: BeforeResume | None = None,
    ) -> None:
        self._settings = ServerSettings(
            timeout,
            soft_timeout,
            wait,
            retry_values,
            result_timeout,
            fallback or DEFAULTS.fallback,
            queue,
            in_flight,
            in_flight_total,
            grace,
            stop_timeout,
            policy,
            handshake,
            blocked_after,
        )
        self._backends = [backends] if isinstance(backends, Backend) else list(backends)
        if not self._backends:
            raise ValueError("a server has at least one backend")
        for vm, count in Counter(backend.vm for backend in self._backends).items():
            if count > 1:
                raise ValueError(f"{count} VMs are named {vm!r}: give each a name of its own")
        self._bridges = [self._bridge_for(backend.vm, bridge) for backend in self._backends]
        _check_shared(self._bridges)
        self._taps = tuple(taps)
        self._before_resume = before_resume
        self._owner: _Owner | None = None
        self._stopped = False
        self._reloading = anyio.Lock()

    def _bridge_for(self, vm: str, bridge: Target | BridgeFactory) -> Bridge:
        target = bridge if isinstance(bridge, BridgeHandler | BridgeDispatch) else bridge(vm)
        whole = target if isinstance(target, Bridge) else Bridge(target)
        return with_handshake(whole, self._settings)

    @property
    def summary(self) -> Summary:
        """Counts of all VMs so far, and how the guests ended.

        Raises `ServerStateError` before `run`.
        """
        return Summary.of_all(self.summaries.values())

    @property
    def summaries(self) -> dict[str, Summary]:
        """The same for each VM, by its name. Raises `ServerStateError` before `run`."""
        if self._owner is None:
            raise ServerStateError("the server has not run yet: iterate over server.run()")
        return {vm: engine.summary for vm, engine in self._owner.engines.items()}

    @property
    def hindrance(self) -> Hindrance | None:
        """What keeps a tap from its work right now: a full disk, a recording that has ended."""
        return hindrance_of(self._taps)

    def health(self) -> list[Reason]:
        """What keeps it from answering a trap now, or is worth knowing. On the event loop."""
        found = reasons_of(self.hindrance)
        if self._owner is None or not self._owner.is_started:
            return [Reason("starting", "the VMs are being opened", "started"), *found]
        return [*health_of(self._owner.engines, self._owner.kept), *found]

    def run(self, until: Until | None = None) -> "Run":
        """Run the guests, and iterate over what became of each of their traps.

        Must be called inside the backends' `async with`, once. The guests start with the
        first step of the iteration, and the iteration ends with the last of them. Leaving
        the loop early stops the server, as `stop` does.

        `until` ends it sooner: `"output"` with the first outcome that has an output, as
        the dispatch loop of vmi-utils 0.5 to 0.7 does, `"exit"` when a handler of the standard
        contract has answered method 0xffff, a number with so many outcomes, or a function with
        the first outcome that it is true for. That outcome is the last one of the iteration, which
        ends when the server has stopped; what was still pending is in the summary only.

        Iterating raises `BackendError` when a VM cannot be run, and what a handler
        raised when it was entered: after the last outcome, so that other VMs run on.
        If cancelled, answers what is pending on the way out. Raises `ServerStateError`
        outside the backends' `async with`, and a second time, `ValueError` for an `until`
        that is none of these.
        """
        is_last = None if until is None else is_last_of(until)
        if self._owner is not None:
            raise ServerStateError("a server runs once: make another for another run")
        self._owner = _Owner(
            self._backends, self._bridges, self._settings, self._taps, self._before_resume
        )
        if self._stopped:
            self._owner.stop()
        return Run(self._owner, is_last)

    async def reload(self, bridge: Target | BridgeFactory) -> int:
        """Give each VM other handlers while it runs; returns how many have them.

        `bridge` is what the constructor takes. Its handlers are entered, and asked of each trap
        from then on. Those of before end what they have begun, and are left; those of the start at
        the end. A VM whose handlers cannot be entered keeps what it has, with a line in the log.

        Raises `ServerStateError` before `run`, `HandlerLifeError` for a shared handler, and what
        the constructor does: nothing is changed then. If cancelled, some VMs may have new ones.
        """
        if self._owner is None:
            raise ServerStateError("the server has not run yet: iterate over server.run()")
        bridges = [self._bridge_for(each.vm, bridge) for each in self._backends]
        _check_shared(bridges)
        async with self._reloading:
            return await self._owner.reload(bridges)

    def stop(self, *, now: bool = False, vm: str | None = None) -> None:
        """End the run in good order: take no more traps, answer those that are there, and
        let the guests go. With `vm`, that of the VM of this name alone: the others run on.

        Returns at once. Handlers that a trap waits for have the grace period to end by
        themselves; with `now`, also in a second call, they are cancelled. All is answered within
        `stop_timeout`; the iteration ends when every handler has unwound, which one that
        shields itself puts off. Before `run`, it makes that run end before it begins.

        Raises `ValueError` for the name of no VM, and `ServerStateError` for one before `run`.
        """
        if vm is not None:
            if self._owner is None:
                raise ServerStateError("the server has not run yet: iterate over server.run()")
            self._owner.stop_vm(vm, now=now)
            return
        self._stopped = True
        if self._owner is not None:
            self._owner.stop(now=now)


class _Owner:
    """Owns one run: its engines, and the handlers that they share."""

    def __init__(
        self,
        backends: list[Backend],
        bridges: list[Bridge],
        settings: ServerSettings,
        taps: tuple[Tap, ...],
        before_resume: BeforeResume | None,
    ) -> None:
        self._watch = LoopWatch(settings.blocked_after, HandlerCalls.ask.__code__)
        self._places = [backend.tasks for backend in backends]
        self.outcomes: OutcomeQueue = OutcomeQueue(OUTCOMES_AHEAD)
        in_flight, turns = InFlight(settings.in_flight_total), Turns()
        self.engines: dict[str, Engine] = {
            backend.vm: Engine(
                backend,
                bridge,
                settings,
                self.outcomes.add_producer(),
                in_flight,
                turns,
                # A backend may want to know what became of its traps, as a replay does.
                (*taps, backend) if isinstance(backend, Tap) else taps,
                self._on_end,
                before_resume,
            )
            for backend, bridge in zip(backends, bridges, strict=True)
        }
        shared = [each for bridge in bridges for each in bridge.handlers if each.shared]
        self._lives = Lives(shared, settings.stop_timeout)
        self._later = LaterHandlers(settings.stop_timeout, self._take_lost)
        self._shared = set(shared)
        self._grace = min(settings.grace, settings.stop_timeout / 2)
        self._error: BaseException | None = None
        self._ended = anyio.Event()
        self.is_started = False
        self.kept: list[str] = []
        """The VMs that kept their handlers at the last reload."""

    def start(self) -> None:
        """Start the run, in the first backend's task group."""
        self.is_started = True
        self._places[0].start_soon(self._main)

    def stop(self, *, now: bool = False) -> None:
        """Stop each engine."""
        self._lives.stop(0 if now else self._grace)
        self._later.stop(0 if now else self._grace)
        for engine in self.engines.values():
            engine.stop(now=now)

    def stop_vm(self, vm: str, *, now: bool) -> None:
        """Stop one engine. Raises `ValueError` where there is none."""
        if vm not in self.engines:
            raise ValueError(f"no VM is named {vm!r}: there are {', '.join(self.engines)}")
        self.engines[vm].stop(now=now)

    async def ended(self) -> None:
        """Wait until nothing is left of the run."""
        await self._ended.wait()

    async def _main(self) -> None:
        """Run each engine in its backend's task group. If cancelled, stops every engine."""
        try:
            with self._watch, lost_exceptions(self._take_lost):
                await self._run()
        except CutOffError as error:
            log.warning("%s", error)
        except Exception as error:
            self._error = error if self._error is None else self._error
        finally:
            self.outcomes.end(self._error)
            self._ended.set()

    async def _run(self) -> None:
        started: list[Engine] = []
        async with self._lives.lived(), self._later.open():
            try:
                for engine, place in zip(self.engines.values(), self._places, strict=True):
                    place.start_soon(engine.main)
                    started.append(engine)
                for engine in started:
                    await engine.ended()
            finally:
                self.stop(now=True)
                with anyio.CancelScope(shield=True):
                    for engine in started:
                        await engine.ended()

    async def reload(self, bridges: list[Bridge]) -> int:
        """Give each engine its bridge; returns how many have it."""
        before = self._shared
        shared = {each for bridge in bridges for each in bridge.handlers if each.shared}
        await self._later.enter(shared - before)
        left, self.kept = await reload_each(self.engines, bridges)
        self._shared = shared | before if self.kept else shared
        self._places[0].start_soon(self._later.leave_after, left, before - self._shared)
        return len(left)

    def _take_lost(self, error: BaseException) -> None:
        """A signal handler has raised it: the run ends with it."""
        self._error = error if self._error is None else self._error
        self.stop()

    def _on_end(self, vm: str, error: BaseException | None) -> None:
        if error is None:
            return
        self._error = error if self._error is None else self._error
        if not isinstance(error, Exception):
            self.stop()
        elif len(self.engines) > 1:
            # The consumer sees it at the end of the run only, which may be far.
            log.error("vm %s: %s; the other VMs run on", vm, one_line(error))


class Run(AsyncIterator[Outcome[Any]]):
    """The outcomes of one run. `async with` it, or `aclose` it, to wait for its end."""

    def __init__(self, owner: _Owner, until: Callable[[Outcome[Any]], bool] | None) -> None:
        self._owner = owner
        self._outcomes = owner.outcomes
        self._until = until
        self._over = False
        self._started = False
        self._thread = get_ident()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome[Any]:
        if not self._started:
            self._owner.start()
            self._started = True
        while self._over:
            # To its end, which raises the error that it ended with, if any.
            await self._outcomes.get()
        # Often there are some, and a coroutine for each would cost as much as all else here.
        outcomes = self._outcomes
        outcome = outcomes.take() if outcomes.items else await outcomes.get()
        if self._until is not None and self._until(outcome):
            self._over = True
            self._owner.stop()
        return outcome

    async def aclose(self) -> None:
        """Stop the server and wait until it has ended. If cancelled, stops waiting."""
        self._owner.stop()
        if self._started:
            await self._owner.ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A consumer that left its loop early reads no more outcomes: do not hold the guest.
        # Collected in another thread, it is left to the end of the backend's block.
        if self._started and get_ident() == self._thread:
            self._owner.stop()


def _check_shared(bridges: list[Bridge]) -> None:
    owners: dict[BridgeHandler[Any], int] = {}
    for number, bridge in enumerate(bridges):
        for handler in bridge.handlers:
            if owners.setdefault(handler, number) != number and not handler.shared:
                raise ValueError(
                    f"handler {handler.name} would serve several VMs with one state: make one"
                    " for each, in a function that is given the VM's name, or set shared = True"
                )
