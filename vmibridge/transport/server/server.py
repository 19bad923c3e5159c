"""`AgentServer`: each VM whose agent connects gets a handler set of its own; only handlers that
say `shared` serve several.

    server = AgentServer(["unix:/run/vmibridge.sock"], HandlerFactory(["handlers/"]))
    await server.run()

Invariants:

- A VM is a session: its handlers, and what it was answered, outlive its connections. It ends
  with its guest, or when its agent was away for `keep` seconds.
- A handler set that is reloaded takes over at once, and the one before retires: it finishes what
  it has begun (`handler_set`). A source that fails changes nothing.
- A handler that says `shared` serves all VMs that it was given for (`shared_handlers`).
- A stop answers what handlers are at, as `BridgeServer` does; traps that come then are given
  back, for the agent to send to the server that follows.
"""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any, TypeAlias

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio.lost_exceptions import lost_exceptions
from vmibridge.bridge.dispatch import Bridge, Target
from vmibridge.bridge.outcome import Outcome
from vmibridge.engine.engines_health import reasons_of
from vmibridge.engine.handler_calls import HandlerCalls
from vmibridge.engine.loop_watch import LoopWatch
from vmibridge.engine.server import BridgeFactory
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Hindrance, Tap, hindrance_of
from vmibridge.errors import RefusedError, ServerStateError
from vmibridge.health.state import Reason
from vmibridge.transport.limits import AgentLimits, NewSessions
from vmibridge.transport.server.away import give_up_agents
from vmibridge.transport.server.backend import SessionBackend
from vmibridge.transport.server.failures import Failures, text_of
from vmibridge.transport.server.handler_set import HandlerSet
from vmibridge.transport.server.listener import Listener
from vmibridge.transport.server.shared_handlers import SharedHandlers
from vmibridge.transport.server.welcome import welcome_to
from vmibridge.transport.session import Repeated, Session
from vmibridge.transport.wire import Hello, Welcome
from vmibridge.vm.trap import TrapEvent

log: logging.Logger = logging.getLogger(__name__)

OnOutcome: TypeAlias = Callable[[Outcome[Any]], Awaitable[None]]
OnEnd: TypeAlias = Callable[[str, Summary, dict[str, int]], Awaitable[None]]
TapFactory: TypeAlias = Callable[[str], Sequence[Tap]]
"""Given the name of a VM: what sees the traffic of one of its handler sets. A tap that is an
async context manager is entered and left. A `hindrance` of its own, of the type of `Tap.hindrance`,
is that of the next VM."""

_MAX_ENDED = 1024
"""Ids of sessions that are known to have ended, or to have been followed by another."""
_TAKE_OVER = 30.0
"""Seconds that handlers may take to be entered, when they are reloaded."""


class _Vm:
    """One session, and the handler sets at work for it."""

    def __init__(self, session: Session, current: HandlerSet) -> None:
        self.session = session
        self.current = current
        self.retired: list[HandlerSet] = []
        self.ended_because = ""
        """Why the host has ended it, if it has."""
        self.summaries: list[Summary] = []

    def route(self, event: TrapEvent) -> SessionBackend:
        for old in self.retired:
            if old.awaits(event):
                return old.backend
        return self.current.backend


class AgentServer:
    """Serves the agents that connect to `urls`.

    `handlers` makes what serves one VM, given its name, as for `BridgeServer`; `settings` are
    those of each VM's server, and `in_flight_total` counts for all of them. `on_outcome` is
    called with each trap, `on_end` with each VM that has ended: its name, its counts, and what no
    outcome tells of (`SessionCounts`). Both may wait: the VM waits with them.

    `repeated` says what becomes of a trap that a server which is gone may have run: by
    default it is refused, and the guest gets the fallback.

    Raises `BackendSpecError` for a URL that is wrong.
    """

    def __init__(
        self,
        urls: Sequence[str],
        handlers: BridgeFactory,
        *,
        settings: ServerSettings | None = None,
        limits: AgentLimits | None = None,
        repeated: Repeated = "refuse",
        on_outcome: OnOutcome | None = None,
        on_end: OnEnd | None = None,
        taps: TapFactory | None = None,
    ) -> None:
        self._handlers = handlers
        self._settings = settings or ServerSettings()
        self._limits = limits or AgentLimits()
        self._repeated: Repeated = repeated
        self._on_outcome = on_outcome
        self._on_end = on_end
        self._taps = taps
        self._listener = Listener(urls, self._limits, self._admit)
        self._shared = SharedHandlers(self._settings.in_flight_total, self._settings.stop_timeout)
        self._new_sessions = NewSessions(self._limits.new_sessions)
        self._vms: dict[bytes, _Vm] = {}
        self._handler_sets: dict[HandlerSet, None] = {}
        self._ended: deque[bytes] = deque(maxlen=_MAX_ENDED)
        self._tasks: TaskGroup | None = None
        self._stop = anyio.Event()
        self._now = False
        self._failures = Failures()
        self.listening: anyio.Event = anyio.Event()
        """Agents can connect."""

    @property
    def ports(self) -> list[int]:
        """The TCP ports that it listens at; 0 for unix sockets."""
        return self._listener.ports

    @property
    def vms(self) -> list[str]:
        """The names of the VMs that are served now, away or not."""
        return [session.vm for session in self._sessions()]

    def _sessions(self) -> Iterator[Session]:
        return (vm.session for vm in self._vms.values())

    @property
    def hindrance(self) -> Hindrance | None:
        """What keeps a tap of a VM, or of the next one, from its work: as `BridgeServer`'s."""
        taps = [tap for each in self._handler_sets for tap in each.taps]
        return hindrance_of([*taps, self._taps])

    @property
    def refused(self) -> int:
        """Peers that were not served, each time that they tried."""
        return self._listener.refused

    def health(self) -> list[Reason]:
        """What keeps it from answering a trap now, or is worth knowing. On the event loop."""
        if self._stop.is_set():
            return [Reason("stopping", "traps are given back to their agents")]
        if not self.listening.is_set():
            return [Reason("starting", "it does not listen yet", "started")]
        return [*self._listener.health(), *reasons_of(self.hindrance), *self._failures.reasons()]

    async def run(self) -> None:
        """Serve until `stop`. If cancelled, stops without grace. Once.

        Raises `BackendError` when it cannot listen, and what a signal handler has raised.
        """
        if self._tasks is not None:
            raise ServerStateError("a server runs once: make another for another run")
        if not await self._open():
            return
        lost: list[BaseException] = []

        def stop(error: BaseException) -> None:
            lost.append(error)
            self.stop()

        watch = LoopWatch(self._settings.blocked_after, HandlerCalls.ask.__code__)
        with watch, lost_exceptions(stop):
            await self._serve()
        for error in lost:
            raise error

    async def _open(self) -> bool:
        """Listen; returns whether it does: a stop does not wait for NATS, or a name server."""
        failed: list[Exception] = []
        done: list[bool] = []

        async with anyio.create_task_group() as tasks:

            async def open_all() -> None:
                try:
                    await self._listener.open()
                    done.append(True)
                except Exception as error:
                    failed.append(error)
                tasks.cancel_scope.cancel()

            tasks.start_soon(open_all)
            await self._stop.wait()
            tasks.cancel_scope.cancel()
        for error in failed:
            raise error
        return bool(done)

    async def _serve(self) -> None:
        connections = anyio.CancelScope(shield=True)
        try:
            async with anyio.create_task_group() as outside:
                outside.start_soon(self._run_listener, connections)
                try:
                    async with anyio.create_task_group() as self._tasks:
                        for place in self._listener.places:
                            log.info("listening at %s", place)
                        self.listening.set()
                        self._tasks.start_soon(give_up_agents, self._sessions, self._limits.keep)
                        try:
                            await self._stop.wait()
                        finally:
                            # Cancelled, too: no VM may begin any more.
                            self._stop.set()
                        # Looked up each time: a reload that is under way may begin one more.
                        while self._handler_sets:
                            await next(iter(self._handler_sets)).done.wait()
                        await self._shared.close()
                        self._tasks.cancel_scope.cancel()
                finally:
                    # Only now: until here answers were on their way.
                    connections.cancel()
        finally:
            self._listener.close()

    async def _run_listener(self, scope: anyio.CancelScope) -> None:
        with scope:
            await self._listener.run()

    def stop(self, *, now: bool = False) -> None:
        """End in good order; `now` leaves handlers no time to end by themselves."""
        self._now = self._now or now
        self._stop.set()
        self._listener.close()
        for handler_set in self._handler_sets:
            handler_set.stop(now=now)

    def end(self, vm: str, why: str) -> bool:
        """End the session of one VM in good order, and take no other one of it: its agent is
        refused, and its guest goes on without a host. Returns whether a VM of this name is served.
        """
        for each in list(self._vms.values()):
            if each.session.vm == vm and not each.session.over.is_set():
                log.info("vm %s: its session ends: %s", vm, why)
                each.ended_because = why
                self._ended.append(each.session.id)
                for handler_set in (each.current, *each.retired):
                    handler_set.stop()
                return True
        return False

    async def reload(self, handlers: BridgeFactory) -> int:
        """Give every VM new handlers; returns how many have them. No trap is dropped.

        A VM whose handlers cannot be made or entered keeps those that it has; VMs that come
        later get the new ones in any case.
        """
        # Both before the first wait: a VM that comes meanwhile gets the new handlers, and what it
        # shares with those of before counts as wanted again.
        self._handlers = handlers
        self._shared.supersede()
        done, kept = 0, list[str]()
        for vm in list(self._vms.values()):
            if vm.session.over.is_set() or vm.ended_because or self._stop.is_set():
                continue
            try:
                handler_set = await self._make(vm.session)
            except RefusedError as error:
                log.warning("vm %s: keeps its current handlers: %s", vm.session.vm, error)
                kept.append(vm.session.vm)
                continue
            if await self._take_over(vm, handler_set):
                done += 1
            else:
                kept.append(vm.session.vm)
        self._failures.reloaded(kept)
        # Not before: a shared handler of both the old and the new sets must stay entered.
        self._shared.leave_unused()
        return done

    async def _take_over(self, vm: _Vm, handler_set: HandlerSet) -> bool:
        assert self._tasks is not None
        name = vm.session.vm
        self._start(vm, handler_set)
        with anyio.move_on_after(_TAKE_OVER):
            async with anyio.create_task_group() as either:

                async def wait(event: anyio.Event) -> None:
                    await event.wait()
                    either.cancel_scope.cancel()

                either.start_soon(wait, handler_set.backend.running)
                either.start_soon(wait, handler_set.ended)
        if not handler_set.backend.running.is_set() or handler_set.ended.is_set():
            handler_set.stop(now=True)
            log.error("vm %s: keeps its current handlers", name)
            return False
        if handler_set.filter != vm.current.filter:
            log.warning(
                "vm %s: traps with magics that are new come once the VM restarts",
                name,
            )
        # Only now that it takes traps: until here the old set has them, so that none is dropped.
        old, vm.current = vm.current, handler_set
        vm.retired.append(old)
        self._tasks.start_soon(old.retire)
        return True

    # --- sessions -------------------------------------------------------------------

    async def _admit(self, hello: Hello, peer: str) -> tuple[Session, Welcome]:
        if self._stop.is_set() or self._tasks is None:
            raise RefusedError("the server stops", final=False)
        if hello.session in self._ended:
            # Its agent has not heard that END had come, or the VM has been restarted.
            raise RefusedError("this VM has ended")
        vm = self._vms.get(hello.session)
        if vm is None:
            vm = await self._begin(hello, peer)
        elif vm.session.owner != peer:
            raise RefusedError("this session is that of another peer")
        current = vm.current
        return vm.session, welcome_to(
            vm.session,
            current.filter,
            current.timeout,
            self._settings.fallback,
            self._limits,
            current.reads,
        )

    async def _begin(self, hello: Hello, peer: str) -> _Vm:
        for other in list(self._vms.values()):
            session = other.session
            if session.vm == hello.vm and not session.over.is_set():
                if session.link is not None or session.owner != peer:
                    raise RefusedError(f"a VM of the name {hello.vm} is served", final=False)
                # The VM was restarted: the agent of the session before will not come back.
                session.lose("its agent restarted")
                # What it has sent may come late, and is not to take the place of this one.
                self._ended.append(session.id)
        if len(self._vms) >= self._limits.sessions:
            raise RefusedError(f"{len(self._vms)} VMs are served, which is the limit", final=False)
        if not self._new_sessions.take(peer, time.monotonic()):
            raise RefusedError("this peer starts too many VMs: try again later", final=False)
        session = Session(
            hello,
            peer,
            vcpus=self._limits.vcpus,
            repeated=self._repeated,
            fallback=self._settings.fallback,
        )
        # `_make` awaits nothing: between the search for a VM of this name and its entry there is no
        # task switch, so two agents cannot both begin it.
        vm = _Vm(session, await self._make(session))
        self._vms[session.id] = vm
        session.route = lambda event: None if self._stop.is_set() else vm.route(event)
        self._start(vm, vm.current)
        return vm

    def _start(self, vm: _Vm, handler_set: HandlerSet) -> None:
        assert self._tasks is not None
        self._handler_sets[handler_set] = None
        self._tasks.start_soon(self._run_to_the_end, vm, handler_set)

    async def _make(self, session: Session) -> HandlerSet:
        """Raises `RefusedError` when the handlers cannot be made."""
        try:
            target: Target = self._handlers(session.vm)
            bridge = target if isinstance(target, Bridge) else Bridge(target)
            taps = () if self._taps is None else self._taps(session.vm)
            return HandlerSet(session, bridge, self._settings, taps, self._shared)
        except Exception as error:
            why = text_of(error)
            self._failures.failed(session.vm, error)
            log.exception("vm %s: its handlers cannot be made: %s", session.vm, why)
            raise RefusedError("the handlers cannot be made", final=False) from error

    async def _run_to_the_end(self, vm: _Vm, handler_set: HandlerSet) -> None:
        """Run a handler set until nothing is left of it."""
        try:
            try:
                await self._run(vm.session, handler_set)
            finally:
                handler_set.ended.set()
                vm.summaries.append(handler_set.summary)
                if handler_set in vm.retired:
                    vm.retired.remove(handler_set)
                elif handler_set is vm.current:
                    self._forget_vm(vm)
            if handler_set is vm.current and self._on_end is not None:
                summary = Summary.of_all(vm.summaries)
                summary.guest = vm.session.guest
                await self._on_end(vm.session.vm, summary, vm.session.counts.as_dict())
        finally:
            # After `on_end`: the server waits for this, so every VM is reported before it ends.
            del self._handler_sets[handler_set]
            handler_set.done.set()

    async def _run(self, session: Session, handler_set: HandlerSet) -> None:
        assert self._tasks is not None
        try:
            async with AsyncExitStack() as stack:
                for tap in handler_set.taps:
                    if isinstance(tap, AbstractAsyncContextManager):
                        await stack.enter_async_context(tap)
                await stack.enter_async_context(
                    self._shared.use(
                        handler_set.handlers, self._tasks, partial(handler_set.stop, now=True)
                    )
                )
                await stack.enter_async_context(handler_set.backend)
                if self._stop.is_set():
                    handler_set.stop(now=self._now)
                self._failures.begun()
                handler_set.start()
                while True:
                    try:
                        outcome = await handler_set.outcome()
                    except StopAsyncIteration:
                        break
                    if self._on_outcome is not None:
                        await self._on_outcome(outcome)
        except BaseException as error:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            # Whatever ended this VM ends no other.
            why = text_of(error)
            self._failures.failed(session.vm, error)
            log.exception("vm %s: its handlers ended: %s", session.vm, why)

    def _forget_vm(self, vm: _Vm) -> None:
        """Its handlers have ended: with the guest, by `end`, by a stop, or by themselves."""
        session = vm.session
        self._vms.pop(session.id, None)
        if session.ended_by_itself:
            self._ended.append(session.id)
        elif not self._stop.is_set() and session.link is not None:
            session.link.close()
        if not self._stop.is_set():
            session.lose(vm.ended_because or "its handlers have ended")
