"""The end beside the VM: it takes the traps of any backend, and has them answered elsewhere.

    async with open_backend("unicorn:guest.bin") as backend:
        end = await Agent(backend, "unix:/run/vmibridge.sock").run()

Invariants:

- A trap is answered once (`traps`): by the server, at the deadline, or by the stop. An answer
  to a trap that is not in flight is dropped.
- A vCPU has one trap in flight (`lanes`). So its order holds, and a server needs to remember
  one answer a vCPU.
- At its deadline a trap is answered here, with the fallback of the server's WELCOME, whether
  the server is slow, unreachable or gone. A guest never stands still for a network.
- A connection that is lost is made again, after a pause that grows, with jitter. In-flight
  traps are then sent again; those that another incarnation may have run are marked.
- Guest memory is accessed for a trap in flight, and for no other.
"""

import logging
import random
import secrets
from collections import Counter, deque
from collections.abc import Awaitable

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from vmibridge.bridge.bounds import Seconds, check
from vmibridge.errors import (
    BackendError,
    BackendSpecError,
    ConnectionLostError,
    RefusedByServerError,
    ServerStateError,
    VmiBridgeError,
    WireError,
)
from vmibridge.health.state import Reason
from vmibridge.transport.agent.dial import dial
from vmibridge.transport.agent.traps import AgentCounts, InFlightTraps
from vmibridge.transport.links import AgentLink, Dialled
from vmibridge.transport.urls import Url, parse_url
from vmibridge.transport.wire import (
    Answer,
    End,
    Ended,
    FromServer,
    Native,
    Read,
    Returned,
    Welcome,
    WireEnd,
    Write,
    register_writes,
    trap_filter,
)
from vmibridge.vm.backend import Backend, GuestEnd, VcpuEnd
from vmibridge.vm.trap import TrapFilter

log: logging.Logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
"""Seconds from a lost connection to the next one, before jitter; doubled each time."""
_MAX_PAUSE = 5.0
_STEADY = 1.0
"""Seconds that a connection has to last, or an answer has to come over it, for the pause after it
to be a short one: a server that welcomes and hangs up is not asked all the time."""
_MAX_IN_A_ROW = 64
"""Frames of the server that are done before other tasks have their turn."""
_LAST = 5.0
"""Seconds for the server to learn that the guest has ended."""


class Agent:
    """Carries the traps of `backend` to the server at `url`.

    `vm` names the VM there, by default as the backend does. `deadline` is how long a vCPU
    waits for an answer at the most, in seconds; by default a little longer than the server
    itself takes. `longest_pause` bounds the time between two tries to connect.

    Raises `BackendSpecError` for a URL that is wrong, `ValueError` for a number that makes
    no sense.
    """

    def __init__(
        self,
        backend: Backend,
        url: str,
        *,
        vm: str | None = None,
        deadline: float | None = None,
        longest_pause: float = _MAX_PAUSE,
        silence: float = 15.0,
        grace: float = 1.0,
    ) -> None:
        self.url: Url = parse_url(url)
        self.vm: str = backend.vm if vm is None else vm
        check("deadline", deadline, Seconds | None)
        if not 0 < len(self.vm) <= 64 or not self.vm.isprintable():
            raise ValueError(f"the name of a VM has 1 to 64 printable characters, got {self.vm!r}")
        if not longest_pause > 0 or not silence > 0 or not grace >= 0:
            raise ValueError("longest_pause, silence and grace are seconds")
        self.session: bytes = secrets.token_bytes(16)
        """The id of this run of this VM."""
        self._backend = backend
        self._in_flight = InFlightTraps(backend, self.vm, deadline)
        self._lanes = self._in_flight.lanes
        self.counts: AgentCounts = self._in_flight.counts
        self._longest_pause = longest_pause
        self._silence = silence
        self._grace = grace
        self._filter = TrapFilter()
        self._welcomed = anyio.Event()
        self._ended = anyio.Event()
        self._stop = anyio.Event()
        self._refused: VmiBridgeError | None = None
        self._lost = "connecting"
        """Why there is no link."""
        self._tasks: TaskGroup | None = None
        self._end: End | None = None
        self._shares: list[dict[str, int]] = []

    @property
    def shares(self) -> dict[str, int]:
        """Where several servers answer: traps that each answered, by the first digits of the id
        of its incarnation."""
        total: Counter[str] = Counter()
        for each in self._shares:
            total.update(each)
        return dict(total)

    def health(self) -> list[Reason]:
        """Why no server would answer a trap now. On the event loop."""
        if self._tasks is None:
            return [Reason("starting", f"vm {self.vm}: it is being opened", "started")]
        link = self._in_flight.link
        why = self._lost if link is None or link.closed else link.away
        return [Reason("server-unreachable", f"vm {self.vm}: {self.url}: {why}")] if why else []

    # --- the run --------------------------------------------------------------------

    async def run(self) -> GuestEnd:
        """Run the guest to its end, which this returns. Once, in the backend's `async with`.

        The guest starts when a server has said which traps it wants. Raises `BackendError`
        when the VM cannot be run, or the server refuses this agent for good; `BackendSpecError`
        for files of the URL, such as certificates, that are not there or are none.
        """
        if self._tasks is not None:
            raise ServerStateError("an agent runs once: make another for another run")
        end = GuestEnd()
        failure: Exception | None = None
        async with anyio.create_task_group() as self._tasks:
            tasks = self._tasks
            tasks.start_soon(self._in_flight.run_errands, tasks)
            tasks.start_soon(self._keep_connected)
            await self._welcomed.wait()
            if self._refused is not None:
                tasks.cancel_scope.cancel()
            elif not self._stop.is_set():
                tasks.start_soon(self._in_flight.watch)
                tasks.start_soon(self._stop_when_asked)
                try:
                    end = await self._backend.run(self._filter, self._lanes)
                except Exception as error:
                    failure = error
                    end = GuestEnd((VcpuEnd(0, "lost", str(error)),))
                self._lanes.close()
                await self._tell_the_end(end)
            tasks.cancel_scope.cancel()
        if isinstance(self._refused, BackendSpecError):
            raise self._refused
        if self._refused is not None:
            raise BackendError(f"{self.url}: {self._refused}") from self._refused
        if failure is not None:
            raise failure
        return end

    def stop(self, *, now: bool = False) -> None:
        """End the run: take no more traps, answer those that wait, and let the guest go.

        Traps in flight have the grace period for the server's answer; with `now`, none.
        """
        if now:
            self._grace = 0.0
        self._lanes.close()
        self._stop.set()
        self._welcomed.set()

    async def _stop_when_asked(self) -> None:
        await self._stop.wait()
        with anyio.move_on_after(self._grace):
            await self._lanes.quiet()
        await self._in_flight.answer_all()
        await self._lanes.quiet()
        self._backend.stop()

    async def _tell_the_end(self, end: GuestEnd) -> None:
        """So that the server forgets the VM; it does so by itself after a while."""
        if self._stop.is_set() and self._in_flight.link is None:
            return
        self._end = End(
            tuple(
                WireEnd(
                    each.vcpu,
                    each.reason[:16],
                    each.detail[:1000],
                    each.registers if len(end.vcpus) <= 64 else {},
                )
                for each in end.vcpus
            )
        )
        if self._in_flight.link is not None:
            self._in_flight.link.post(self._end)
        with anyio.move_on_after(_LAST):
            await self._ended.wait()

    # --- the connection -------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff, logged = Backoff(self._longest_pause), ""
        while not self._ended.is_set():
            why = ""
            try:
                async with dial(self.url, self.session, self.vm, self._backend) as dialled:
                    self._on_welcome(dialled)
                    log.log(
                        logging.INFO,
                        "vm %s: %s to %s",
                        self.vm,
                        "connected again" if self.counts.connections > 1 else "connected",
                        self.url,
                    )
                    since, answered = anyio.current_time(), self.counts.answered
                    try:
                        await self._run_link(dialled)
                    finally:
                        lasted = anyio.current_time() - since >= _STEADY
                        if lasted or self.counts.answered > answered:
                            backoff, logged = Backoff(self._longest_pause), ""
            except RefusedByServerError as error:
                why = f"refused: {error}"
                if error.final and self._end is not None:
                    # It has heard that the guest has ended, and said so in vain.
                    self._ended.set()
                if error.final and not self.counts.connections:
                    self._refused = error
                    self._welcomed.set()
                    return
            except BackendSpecError as error:
                # A file of the URL: at the start it is mistyped, and later being renewed.
                why = str(error)
                if not self.counts.connections:
                    self._refused = error
                    self._welcomed.set()
                    return
            except (OSError, TimeoutError, ConnectionLostError, WireError) as error:
                why = _why(error)
            finally:
                self._in_flight.link = None
            self._lost = why or "the connection is lost"
            if self._ended.is_set():
                return
            if why != logged:
                log.warning("vm %s: %s: %s; trying again", self.vm, self.url, why)
                logged = why
            await anyio.sleep(backoff.next())

    def _on_welcome(self, dialled: Dialled) -> None:
        welcome: Welcome = dialled.welcome
        self.counts.connections += 1
        self._shares.append(dialled.shares)
        wanted = trap_filter(welcome)
        if not self._welcomed.is_set():
            self._filter = wanted
        elif wanted != self._filter:
            log.warning("vm %s: the server wants other traps now: restart the VM", self.vm)
        link = dialled.link
        self._welcomed.set()
        link.cork()
        self._in_flight.go_on_with(link, welcome)
        if self._end is not None:
            link.post(self._end)
        link.uncork()

    async def _run_link(self, dialled: Dialled) -> None:
        """Take frames until the connection is lost."""
        async with anyio.create_task_group() as tasks:
            for each in dialled.tasks(self._silence):
                tasks.start_soon(each)
            lost = _Lost()
            # Not in this group: an answer that is being written outlives its connection.
            assert self._tasks is not None
            self._tasks.start_soon(self._take_frames, dialled.link, deque[FromServer](), lost)
            await lost.happened.wait()
            tasks.cancel_scope.cancel()
        if lost.error is not None:
            raise lost.error

    async def _take_frames(self, link: AgentLink, frames: deque[FromServer], lost: "_Lost") -> None:
        """Answers and accesses are done inside this task; one that waits has another go on."""
        in_a_row = 0
        try:
            while True:
                if not frames:
                    link.uncork()
                    frames.extend(await link.receive())
                    link.cork()
                elif in_a_row >= _MAX_IN_A_ROW:
                    in_a_row = 0
                    link.uncork()
                    await checkpoint()
                    link.cork()
                in_a_row += 1
                frame = frames.popleft()
                rest: Awaitable[None] | None = None
                if isinstance(frame, Answer):
                    rest = self._in_flight.answer(frame.seq, register_writes(frame))
                elif isinstance(frame, Native):
                    rest = self._in_flight.answer(frame.seq, None)
                elif isinstance(frame, Read | Write):
                    if link.closed:
                        # It has asked for more than it reads: no memory is read for it.
                        raise ConnectionLostError("closed by the peer")
                    rest = self._in_flight.access(frame)
                elif isinstance(frame, Returned):
                    self._in_flight.take_back(frame.seq)
                elif isinstance(frame, Ended):
                    self._ended.set()
                elif isinstance(frame, Welcome):
                    raise WireError("a second WELCOME")
                if rest is not None:
                    link.uncork()
                    assert self._tasks is not None
                    self._tasks.start_soon(self._take_frames, link, frames, lost)
                    await rest
                    return
        except (ConnectionLostError, WireError) as error:
            lost.error = error
            lost.happened.set()


def _why(error: Exception) -> str:
    """In the words of the system, without its numbers."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Backoff:
    """The pauses between tries to connect, in seconds."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._pause = _FIRST_PAUSE

    def next(self) -> float:
        """The next one, twice the last; with jitter, so that agents that lost the same server do
        not come back at once."""
        pause, self._pause = self._pause, min(self._pause * 2, self._longest)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311


class _Lost:
    """How a connection ended."""

    def __init__(self) -> None:
        self.happened = anyio.Event()
        self.error: VmiBridgeError | None = None
