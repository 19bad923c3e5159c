"""The server: a backend and a bridge, brought together.

    async with open_backend("unicorn:guest.bin") as backend:
        server = BridgeServer(backend, Bridge(Hello()), timeout=5.0)
        async for outcome in server.run():
            ...

The tasks that `run` starts belong to the backend's `async with`: leaving it answers
whatever is pending, stops the guest, and only then goes on.
"""

from collections.abc import AsyncIterator, Callable
from threading import get_ident
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from anyio.abc import TaskGroup

from vmibridge.dispatch import Bridge, Target
from vmibridge.engine import Engine, EngineSettings, Summary
from vmibridge.errors import ServerStateError
from vmibridge.outcome import Outcome
from vmibridge.outcomes import OutcomeQueue
from vmibridge.response import BridgeResponse
from vmibridge.vmi import Backend

OUTCOMES_AHEAD = 1024
"""Outcomes that are kept for a consumer that lags, before vCPUs wait for it."""


Until: TypeAlias = Literal["output"] | Callable[[Outcome[Any]], bool]
"""When a run ends, other than with its guest."""


class BridgeServer:
    """Answers the traps of one backend with the handlers of one bridge.

    `timeout` is in seconds, for each request, where neither its handler nor its
    method says otherwise. `fallback` is what the guest gets when a handler matched but
    did not answer; by default its registers stay as they were. `queue` bounds the
    traps that wait, `stop_timeout` the seconds that a shutdown may take. Raises
    `ValueError` for a number that makes no sense.
    """

    def __init__(
        self,
        backend: Backend,
        bridge: Target,
        *,
        timeout: float = 5.0,
        fallback: BridgeResponse[Any] | None = None,
        queue: int = 256,
        stop_timeout: float = 5.0,
    ) -> None:
        self._backend = backend
        self._bridge = bridge if isinstance(bridge, Bridge) else Bridge(bridge)
        self._settings = EngineSettings(timeout, fallback or BridgeResponse(), queue, stop_timeout)
        self._engine: Engine | None = None
        self._stopped = False

    @property
    def summary(self) -> Summary:
        """Counts so far, and how the guest ended. Raises `ServerStateError` before `run`."""
        if self._engine is None:
            raise ServerStateError("the server has not run yet: iterate over server.run()")
        return self._engine.summary

    def run(self, until: Until | None = None) -> "Run":
        """Run the guest, and iterate over what became of each of its traps.

        Must be called inside the backend's `async with`, once. The guest starts with
        the first step of the iteration and the iteration ends with the guest. Leaving
        the loop early stops the server, as `stop` does.

        `until` ends it sooner: `"output"` with the first outcome that has an output, as
        the dispatch loop of vmi-utils 0.5 to 0.7 does, or a function with the first
        outcome that it is true for. That outcome is the last one of the iteration, which
        ends when the server has stopped; what was still pending is in the summary only.

        Iterating raises `BackendError` when the VM cannot be run, and what a handler
        raised when it was entered. Cancelled, it answers what is pending on the way out.
        Raises `ServerStateError` outside the backend's `async with`, and a second time.
        """
        if self._engine is not None:
            raise ServerStateError("a server runs once: make another for another run")
        tasks = self._backend.tasks
        outcomes = OutcomeQueue(OUTCOMES_AHEAD)
        self._engine = Engine(self._backend, self._bridge, self._settings, outcomes)
        if self._stopped:
            self._engine.stop()
        return Run(self._engine, outcomes, tasks, _has_output if until == "output" else until)

    def stop(self) -> None:
        """End the run in good order: answer what is pending, stop the guest.

        Returns at once. The answers are written within `stop_timeout`; the iteration
        ends when every handler has unwound, which one that shields itself puts off.
        Before `run`, it makes that run end before it begins.
        """
        self._stopped = True
        if self._engine is not None:
            self._engine.stop()


class Run(AsyncIterator[Outcome[Any]]):
    """The outcomes of one run. `async with` it, or `aclose` it, to wait for its end."""

    def __init__(
        self,
        engine: Engine,
        outcomes: OutcomeQueue,
        tasks: TaskGroup,
        until: Callable[[Outcome[Any]], bool] | None,
    ) -> None:
        self._engine = engine
        self._outcomes = outcomes
        self._tasks = tasks
        self._until = until
        self._over = False
        self._started = False
        self._thread = get_ident()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome[Any]:
        if not self._started:
            self._started = True
            self._tasks.start_soon(self._engine.main)
        while self._over:
            # To its end, where the error is told that it may have ended with.
            await self._outcomes.get()
        outcome = await self._outcomes.get()
        if self._until is not None and self._until(outcome):
            self._over = True
            self._engine.stop()
        return outcome

    async def aclose(self) -> None:
        """Stop the server and wait until it has ended. Cancelled, it stops waiting."""
        self._engine.stop()
        if self._started:
            await self._engine.ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A consumer that left its loop early: nobody will read on, so do not hold the guest.
        # Collected in another thread, it is left to the end of the backend's block.
        if self._started and get_ident() == self._thread:
            self._engine.stop()


def _has_output(outcome: Outcome[Any]) -> bool:
    return outcome.output is not None
