"""The engine of one backend: from its traps to their answers.

Rules that it lives by:

- Every trap is answered once. Whoever answers it first takes it out of `_waiting`
  (or never lets it in): the worker when the handler ends, the watchdog at the
  deadline, the shutdown when it comes.
- A worker takes a ready trap and runs its handler inline. When the handler waits,
  another worker takes over the lanes (`_promote`), and the deadline is armed: one
  watchdog for all, no cancel scope per trap. A handler that never waits can miss no
  deadline.
- At the deadline the guest gets its fallback at once; the handler is cancelled, and
  may take its time to unwind: it is cut off from the guest's memory.
- All of this is shielded from cancellation from outside, which `main` turns into
  `shut_down`: so an answer that is being written is always written.
"""

import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.arch import is_guest_request, read_packet, write_response
from vmibridge.context import BridgeContext
from vmibridge.dispatch import Bridge, Entry, answer, failure, one_line
from vmibridge.errors import HandlerLifeError, UnsupportedTrapError
from vmibridge.event import RegisterWrites, TrapEvent, TrapReason
from vmibridge.handler import BridgeHandler
from vmibridge.inline import run_inline
from vmibridge.lanes import Lanes
from vmibridge.outcome import Outcome, OutcomeKind
from vmibridge.outcomes import OutcomeQueue
from vmibridge.packet import BridgePacket
from vmibridge.response import BridgeResponse
from vmibridge.vmi import Backend, GuestEnd

log = logging.getLogger(__name__)

_clock = time.monotonic
_deadline = attrgetter("deadline")

_MAX_IDLE = 1024
"""Idle workers that are kept; one costs about 4 KiB, and starting one three times a wake-up."""


class EngineSettings(msgspec.Struct, frozen=True):
    """What a server asks of its engines. Raises `ValueError` for what makes no sense."""

    timeout: float = 5.0
    """Seconds for one request, where neither handler nor method says otherwise."""
    fallback: BridgeResponse[Any] = BridgeResponse()
    """What the guest gets when a handler did not answer; by default its registers stay."""
    queue: int = 256
    """Traps that may be queued; a full queue holds the vCPU."""
    stop_timeout: float = 5.0
    """Seconds in which a shutdown has to have answered every trap."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout is a positive number of seconds, got {self.timeout!r}")
        if not self.stop_timeout > 0:
            raise ValueError(
                f"stop_timeout is a positive number of seconds, got {self.stop_timeout!r}"
            )
        if self.queue < 1:
            raise ValueError(f"queue holds at least one trap, got {self.queue!r}")


class Summary(msgspec.Struct):
    """Counts of one run, and how the guest ended."""

    outcomes: dict[OutcomeKind, int]
    native: int = 0
    """Traps that were not ours and ran natively."""
    guest: GuestEnd | None = None
    """`None` until the guest has ended."""

    @property
    def total(self) -> int:
        """How many traps were answered."""
        return sum(self.outcomes.values())


_NO_16_BIT = "16-bit guest code has no register form in the bridge protocol"


class _Worker:
    """A task that answers traps, one after the other, and the trap that it is at."""

    __slots__ = (
        "context",
        "deadline",
        "entry",
        "event",
        "on_wait",
        "overtaken",
        "packet",
        "scope",
        "started",
    )

    scope: anyio.CancelScope
    on_wait: Callable[[], None]
    event: TrapEvent
    started: float
    packet: BridgePacket
    context: BridgeContext
    entry: Entry | None
    """Who was asked; `None` unless the handler runs."""
    deadline: float
    overtaken: bool
    """Somebody else has answered this trap, and cancelled the scope."""


class Engine:
    """Serves one backend. See the module for its rules."""

    def __init__(
        self, backend: Backend, bridge: Bridge, settings: EngineSettings, outcomes: OutcomeQueue
    ) -> None:
        self.summary = Summary(dict.fromkeys(OutcomeKind, 0))
        self._backend = backend
        self._bridge = bridge
        self._filter = bridge.trap_filter
        self._settings = settings
        self._outcomes = outcomes
        self._lanes = Lanes(settings.queue)
        self._waiting: set[_Worker] = set()
        self._stop = anyio.Event()
        self._stopping = False
        self._ended = anyio.Event()
        self._error: BaseException | None = None
        self._shield = anyio.CancelScope(shield=True)
        self._guest_done = False
        self._told = False
        self._wake_at = math.inf
        self._poke = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._cancelled = anyio.get_cancelled_exc_class()

    def stop(self) -> None:
        """Ask for the end: pending traps are answered, then the guest is let go."""
        self._stop.set()

    async def ended(self) -> None:
        """Wait until the engine has ended and nothing of it is left."""
        await self._ended.wait()

    async def main(self) -> None:
        """Serve until the guest ends, `stop` is called, or this is cancelled.

        Errors of the backend and of entering a handler go to the consumer of the
        outcomes, after the last of them.
        """
        try:
            async with AsyncExitStack() as handlers:
                for handler in dict.fromkeys(self._bridge.handlers):
                    if handler.has_life():
                        await handlers.enter_async_context(_life(handler))
                if self._stop.is_set():
                    return
                async with anyio.create_task_group() as outside:
                    outside.start_soon(self._serve, outside.cancel_scope)
                    try:
                        await self._stop.wait()
                    finally:
                        self._shut_down()
        except Exception as error:
            self._error = self._error or error
        finally:
            self._outcomes.end(self._error)
            self._ended.set()

    async def _serve(self, outside: anyio.CancelScope) -> None:
        with self._shield:
            async with anyio.create_task_group() as watch:
                watch.start_soon(self._watch)
                async with anyio.create_task_group() as self._tasks:
                    self._tasks.start_soon(self._work, self._tasks)
                    await self._run_guest()
                watch.cancel_scope.cancel()
        outside.cancel()

    async def _run_guest(self) -> None:
        try:
            if not self._stopping:
                self.summary.guest = await self._backend.run(self._filter, self._lanes)
        except Exception as error:
            self._error = self._error or error
        finally:
            self._guest_done = True
            self._lanes.close()

    async def _work(self, tasks: TaskGroup) -> None:
        worker = _Worker()
        worker.on_wait = partial(self._worker_waits, worker, tasks)
        while True:
            try:
                with anyio.CancelScope() as worker.scope:
                    if not await self._answer_traps(worker):
                        return
            except Exception:
                # A handler that was overtaken may end as it likes: its trap is answered.
                if not worker.overtaken:
                    raise
                log.debug("a handler raised while it was being cancelled", exc_info=True)

    async def _answer_traps(self, worker: _Worker) -> bool:
        """Answer traps while there are any; returns whether to go on with a new scope."""
        lanes = self._lanes
        worker.overtaken = False
        while not worker.overtaken:
            event = lanes.get_nowait()
            if event is None:
                if lanes.idle >= _MAX_IDLE:
                    return False
                event = await lanes.get()
                if event is None:
                    return False
            worker.event = event
            worker.entry = None
            await run_inline(self._answer(worker), worker.on_wait)
        return True

    def _worker_waits(self, worker: _Worker, tasks: TaskGroup) -> None:
        if worker.entry is not None:
            timeout = None
            if worker.entry.handler is not None:
                timeout = worker.entry.handler.timeout_of(worker.packet.method)
            worker.deadline = worker.started + (
                self._settings.timeout if timeout is None else timeout
            )
            self._waiting.add(worker)
            if worker.deadline < self._wake_at:
                self._poke.set()
        self._promote(tasks)

    def _promote(self, tasks: TaskGroup) -> None:
        """See to it that a worker will take the next ready trap."""
        if not (self._lanes.wake() if self._lanes.has_ready else self._lanes.attended):
            tasks.start_soon(self._work, tasks)

    async def _answer(self, worker: _Worker) -> None:
        event = worker.event
        worker.started = _clock()
        packet = self._read_ours(event)
        if packet is None:
            return await self._run_natively(event)
        entries = self._bridge.match(packet, event.reason)
        if event.width == 16:
            # Told once: a guest may not fill the log.
            log.log(
                logging.DEBUG if self._told else logging.WARNING, "vm %s: %s", event.vm, _NO_16_BIT
            )
            self._told = True
            outcome: Outcome[Any] = Outcome(OutcomeKind.FAILED, packet, error=_NO_16_BIT)
        elif not entries:
            outcome = Outcome(OutcomeKind.UNMATCHED, packet)
        else:
            worker.packet = packet
            worker.context = BridgeContext(event, self._backend)
            outcome = await self._ask(worker, entries)
            if worker.overtaken:
                return None
            worker.entry = None
            self._waiting.discard(worker)
            worker.context.close()
        return await self._finish(event, worker.started, outcome)

    def _read_ours(self, event: TrapEvent) -> BridgePacket | None:
        """The request of a trap that is ours; `None` for others, which carry none for us."""
        try:
            packet = read_packet(event)
        except UnsupportedTrapError:
            return None
        if not self._filter.wants(event.reason, packet.magic):
            return None
        hypercall = event.reason is not TrapReason.CPUID
        if hypercall and self._backend.other_hypercalls and not is_guest_request(event):
            return None
        return packet

    async def _ask(self, worker: _Worker, entries: tuple[Entry, ...]) -> Outcome[Any]:
        packet = worker.packet
        for entry in entries:
            worker.entry = entry
            try:
                outcome = await answer(entry, worker.context, packet)
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
                # Such as SystemExit: the server goes down with it, in good order.
                if worker.overtaken:
                    raise
                self._error = self._error or error
                self.stop()
                return failure(entry.name, packet, error)
            if outcome.kind is not OutcomeKind.UNMATCHED:
                return outcome
        return Outcome(OutcomeKind.UNMATCHED, packet)

    async def _finish(self, event: TrapEvent, started: float, outcome: Outcome[Any]) -> None:
        """Write the answer, then tell of it, then let the vCPU's next trap in."""
        kind, error = outcome.kind, outcome.error
        response = outcome.response
        if kind is OutcomeKind.UNMATCHED:
            response = None
        elif kind is not OutcomeKind.HANDLED:
            response = self._settings.fallback
        writes: RegisterWrites | None = write_response(event, response)
        try:
            await self._backend.resume(event, writes)
        except Exception as lost:
            log.exception("the answer to trap %d of vm %s was not written", event.seq, event.vm)
            kind, writes, error = OutcomeKind.FAILED, None, f"not written: {one_line(lost)}"
        self.summary.outcomes[kind] += 1
        done: Outcome[Any] = Outcome(
            kind,
            outcome.packet,
            response,
            outcome.handler,
            error,
            event,
            writes,
            _clock() - started,
        )
        if not self._outcomes.put_nowait(done):
            await self._outcomes.put(done)
        self._lanes.release(event.vcpu)

    async def _run_natively(self, event: TrapEvent) -> None:
        self.summary.native += 1
        try:
            await self._backend.resume(event, None)
        except Exception:
            log.exception("trap %d of vm %s did not run natively", event.seq, event.vm)
        self._lanes.release(event.vcpu)

    # --- deadlines and shutdown: the two that overtake a worker ---------------------

    async def _watch(self) -> None:
        while True:
            now = _clock()
            due = [worker for worker in self._waiting if worker.deadline <= now]
            for worker in sorted(due, key=_deadline):
                self._overtake(
                    worker,
                    OutcomeKind.TIMEOUT,
                    f"no answer within {worker.deadline - worker.started:g} s",
                )
            self._wake_at = min((worker.deadline for worker in self._waiting), default=math.inf)
            self._poke = anyio.Event()
            with anyio.move_on_after(self._wake_at - now):
                await self._poke.wait()

    def _overtake(self, worker: _Worker, kind: OutcomeKind, error: str) -> None:
        """Answer in the place of a handler that runs, and cancel it."""
        assert self._tasks is not None
        assert worker.entry is not None
        self._waiting.discard(worker)
        worker.overtaken = True
        worker.context.close()
        worker.scope.cancel()
        outcome: Outcome[Any] = Outcome(kind, worker.packet, handler=worker.entry.name, error=error)
        self._tasks.start_soon(
            self._finish_overtaken, worker.event, worker.started, outcome, self._tasks
        )

    async def _finish_overtaken(
        self, event: TrapEvent, started: float, outcome: Outcome[Any], tasks: TaskGroup
    ) -> None:
        await self._finish(event, started, outcome)
        self._promote(tasks)

    def _shut_down(self) -> None:
        """Answer all that is pending or queued, take no more, then stop the guest."""
        self._stopping = True
        queued = self._lanes.drain()
        self._outcomes.unbind()
        if self._tasks is None or (self._guest_done and not self._waiting and not queued):
            return
        self._shield.deadline = anyio.current_time() + self._settings.stop_timeout
        for worker in list(self._waiting):
            self._overtake(worker, OutcomeKind.CANCELLED, "the server stopped")
        self._tasks.start_soon(self._let_go, queued)

    async def _let_go(self, queued: list[TrapEvent]) -> None:
        for event in queued:
            packet = self._read_ours(event)
            if packet is None:
                await self._run_natively(event)
                continue
            outcome: Outcome[Any] = Outcome(
                OutcomeKind.CANCELLED, packet, error="the server stopped"
            )
            await self._finish(event, _clock(), outcome)
        await self._lanes.quiet()
        self._backend.stop()


@asynccontextmanager
async def _life(handler: BridgeHandler[Any]) -> AsyncIterator[None]:
    """Enter and leave a handler; an error of it names the handler."""
    try:
        await handler.__aenter__()
    except Exception as error:
        raise HandlerLifeError(
            f"handler {handler.name} did not start: {one_line(error)}"
        ) from error
    try:
        yield
    finally:
        try:
            await handler.__aexit__(None, None, None)
        except Exception as error:
            raise HandlerLifeError(
                f"handler {handler.name} did not end: {one_line(error)}"
            ) from error
