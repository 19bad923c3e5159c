"""The engine of one backend: from the start of its guest to the last answer.

Invariants:

- Handlers are entered before the guest runs, and left after the last answer.
- A stop has four steps: no trap is taken any more, and what is queued is answered;
  handlers that a trap waits for have the grace period to end by themselves; the others
  are answered for, and cancelled; the backend disarms its traps and lets the guest go.
- All of this is shielded from cancellation from outside, which `main` turns into a stop
  without grace: so an answer that is being written is always written.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import anyio
from anyio.abc import TaskGroup

from vmibridge.bridge.dispatch import Bridge
from vmibridge.engine.handler_lives import CutOffError, Lives
from vmibridge.engine.outcome_queue import OutcomeProducer
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.reloading import LaterHandlers, StillRunning
from vmibridge.engine.replies import BeforeResume
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Tap
from vmibridge.engine.vm_taps import Taps
from vmibridge.engine.workers import Workers
from vmibridge.vm.backend import Backend

log: logging.Logger = logging.getLogger(__name__)


class Engine:
    """Serves one backend. See the module for its rules."""

    def __init__(
        self,
        backend: Backend,
        bridge: Bridge,
        settings: ServerSettings,
        outcomes: OutcomeProducer,
        in_flight: InFlight,
        turns: Turns,
        taps: Sequence[Tap],
        on_end: Callable[[str, BaseException | None], None],
        before_resume: BeforeResume | None = None,
        *,
        is_interruptible: bool = True,
    ) -> None:
        # None where there are none: a trap then pays one test, and no call.
        self._taps = Taps(backend.vm, bridge.trap_filter, taps) if taps else None
        self._backend = backend
        self._on_end = on_end
        own = [each for each in bridge.handlers if not each.shared]
        self._lives = Lives(own, settings.stop_timeout)
        self._settings = settings
        self._outcomes = outcomes
        self._workers = Workers(
            backend,
            bridge,
            settings,
            outcomes,
            in_flight,
            turns,
            self._taps,
            # Where VMs of others are served, no handler can end one: see `handler_calls`.
            self._stop_for if is_interruptible else None,
            before_resume,
        )
        self._bridge = bridge
        self._turns = turns
        self._later = LaterHandlers(settings.stop_timeout, self._stop_for)
        self._serving = anyio.Event()
        self._armed = bridge.trap_filter
        self._stop = anyio.Event()
        self._grace = anyio.CancelScope()
        self._stopping = False
        self._ended = anyio.Event()
        self._error: BaseException | None = None
        self._shield = anyio.CancelScope(shield=True)
        self._answered_by = 0.0
        self._guest_done = False
        self._tasks: TaskGroup | None = None
        self._outside: TaskGroup | None = None

    @property
    def summary(self) -> Summary:
        """Counts so far."""
        return self._workers.summary

    @property
    def phase(self) -> Literal["starting", "serving", "stopping", "ended"]:
        """Where it stands: `serving` from when its handlers are entered."""
        if self._ended.is_set():
            return "ended"
        if self._stop.is_set() or self._stopping:
            return "stopping"
        return "serving" if self._serving.is_set() else "starting"

    @property
    def error(self) -> BaseException | None:
        """What it ended with, or is about to."""
        return self._error

    def stop(self, *, now: bool = False) -> None:
        """Ask for the end: pending traps are answered, then the guest is let go.

        `now` leaves handlers no time to end by themselves.
        """
        grace = min(self._settings.grace, self._settings.stop_timeout / 2)
        self._lives.stop(0 if now else grace)
        self._later.stop(0 if now else grace)
        if now:
            self._grace.cancel()
        self._workers.take_no_more()
        self._stop.set()

    async def ended(self) -> None:
        """Wait until the engine has ended and nothing of it is left."""
        await self._ended.wait()

    async def reload(self, bridge: Bridge) -> StillRunning | None:
        """Ask `bridge` from here on: see `reloading`. Returns which handlers of before still run;
        `None`: the run ends, and nothing is changed.

        Waits until the guest runs, and until the new handlers are entered. Raises
        `HandlerLifeError` for one that cannot be: then nothing is changed.
        """
        await self._serving.wait()
        if self._stop.is_set():
            return None
        await self._later.enter([each for each in bridge.handlers if not each.shared])
        tasks = self._outside
        if tasks is None:
            return None
        if not self._armed.covers(bridge.trap_filter):
            log.warning(
                "vm %s: traps with magics that are new come once the guest is started again",
                self._backend.vm,
            )
        before, self._bridge = self._bridge, bridge
        left = self._workers.replace(bridge)
        if self._taps is not None and self._taps.handlers_reloaded is not None:
            self._taps.handlers_reloaded(self._backend.vm, bridge, self._settings)
        tasks.start_soon(self._leave, before, left)
        return left

    async def _leave(self, before: Bridge, left: StillRunning) -> None:
        await left.ended()
        gone = set(before.handlers) - set(self._bridge.handlers)
        await self._later.leave_after((), gone)
        self._turns.forget(each for each in gone if not each.shared)

    async def main(self) -> None:
        """Serve until the guest ends, `stop` is called, or this is cancelled.

        Errors of the backend and of entering a handler are given to `on_end`.
        """
        try:
            async with self._lives.lived():
                if self._stop.is_set():
                    return
                async with self._later.open(), anyio.create_task_group() as outside:
                    outside.start_soon(self._serve, outside.cancel_scope)
                    self._outside = outside
                    self._serving.set()
                    try:
                        await self._stop.wait()
                        self._begin_stop()
                        with self._grace:
                            self._grace.deadline = anyio.current_time() + min(
                                self._settings.grace, self._settings.stop_timeout / 2
                            )
                            await self._workers.lanes.quiet()
                    finally:
                        self._outside = None
                        self._begin_stop()
                        self._end()
        except CutOffError as error:
            log.warning("vm %s: %s", self._backend.vm, error)
        except Exception as error:
            self._error = error if self._error is None else self._error
        finally:
            self._on_end(self._backend.vm, self._error)
            self._serving.set()
            self._ended.set()

    async def _serve(self, outside: anyio.CancelScope) -> None:
        if self._taps is not None:
            self._taps.begin(
                self._bridge,
                self._settings,
                self._stop_for,
                self._backend.architecture,
                self._workers.source,
            )
            self._backend.on_session_event = self._taps.session_event
        try:
            with self._shield:
                async with anyio.create_task_group() as watch:
                    watch.start_soon(self._workers.deadlines.watch)
                    async with anyio.create_task_group() as self._tasks:
                        self._workers.start(self._tasks)
                        await self._run_guest()
                    watch.cancel_scope.cancel()
        finally:
            if self._taps is not None:
                self._backend.on_session_event = None
                self._taps.end(self.summary)
        outside.cancel()

    async def _run_guest(self) -> None:
        try:
            if not self._stopping:
                self.summary.guest = await self._backend.run(
                    self._workers.filter, self._workers.lanes
                )
        except Exception as error:
            self._error = error if self._error is None else self._error
        finally:
            self._guest_done = True
            self._workers.guest_ended()

    def _stop_for(self, error: BaseException) -> None:
        self._error = error if self._error is None else self._error
        self.stop()

    def _begin_stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._answered_by = anyio.current_time() + self._settings.stop_timeout
            self._workers.take_no_more()
            self._outcomes.unbind()

    def _end(self) -> None:
        # Not before: where something held up the loop for longer than all of this takes, the
        # answers that are given now would be cut short before they were begun.
        self._shield.deadline = max(
            self._answered_by, anyio.current_time() + self._settings.stop_timeout / 2
        )
        if self._tasks is not None and not self._guest_done:
            self._tasks.start_soon(self._release_guest)
        if self._taps is not None:
            self._taps.let_go()
        self._workers.cancel()

    async def _release_guest(self) -> None:
        await self._workers.lanes.quiet()
        self._backend.stop()
