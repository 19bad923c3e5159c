"""What a server remembers of a VM whose agent is elsewhere: frames in, frames out, no I/O.

Invariants. Sequence numbers and ids decide, never timing, so a duplicate or a late frame has the
same effect whenever it comes:

| a trap of a vCPU comes, and | then |
|---|---|
| its number is higher than the last one | it is a new one, and is given to the engine |
| it is the last one, and was answered | it gets the same answer again |
| it is the last one, and is not answered | its answer will go to where it came from now |
| its number is lower | its vCPU has gone on: dropped |
| it was sent to another incarnation | it may have run: as `repeated` says, refused or run |

- One answer a vCPU is remembered, which is enough: a vCPU has one trap in flight. It stays when
  it was sent, for the connection may be lost before the agent has it.
- The agent may be away for a while. Handlers go on; accesses to guest memory wait, and are
  sent again to the connection that comes.
- An answer to a trap that is not in flight any more goes nowhere.
- Memory that came along with traps is bounded in all (`MAX_PREFETCHED`), and dropped with the
  answer: beyond it a handler asks for what it reads, as if nothing had come.

`route` says which `SessionBackend`, and so which handler set, gets a trap. There are several when
handlers were reloaded.
"""

import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol, TypeAlias

import anyio

from vmibridge.bridge.registers import write_response
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import GuestMemoryError, WireError
from vmibridge.transport.links import Link
from vmibridge.transport.session_events import SessionEvents
from vmibridge.transport.wire import (
    FRAME_LIMIT,
    MAX_ACCESSES,
    MAX_LARGE_ACCESSES,
    MAX_PREFETCHED_PER_TRAP,
    NO_DEADLINE,
    SMALL_ACCESS,
    Answer,
    Cancel,
    End,
    Ended,
    FromAgent,
    Hello,
    Memory,
    Native,
    Ping,
    Pong,
    Read,
    Returned,
    Trap,
    Welcome,
    Write,
    answer_frame,
    layout_of,
    trap_event,
)
from vmibridge.vm.arch import architecture_named
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.backend import GuestEnd, SessionEvent, SessionEventKind, VcpuEnd
from vmibridge.vm.trap import RegisterWrites, TrapEvent

log: logging.Logger = logging.getLogger(__name__)

MAX_PREFETCHED = 16 << 20
"""Bytes that are kept of what came along with the unanswered traps of a VM."""

_clock = time.monotonic
_PONG, _ENDED = Pong(), Ended()

Repeated: TypeAlias = Literal["refuse", "run"]
"""What becomes of a trap that may have run in a server that is gone."""


class SessionCounts:
    """What happened that no outcome tells of."""

    __slots__ = ("connections", "late", "refused", "repeated", "returned")

    def __init__(self) -> None:
        self.connections: int = 0
        self.repeated: int = 0
        """Traps that came again: answered again, or still with their handler."""
        self.refused: int = 0
        """Traps that may have run elsewhere, and were not run here."""
        self.late: int = 0
        """Answers that came too late: their trap was not pending any more."""
        self.returned: int = 0
        """Traps that were given back, because the server stops."""

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {name: getattr(self, name) for name in self.__slots__}


class TakesTraps(Protocol):
    """A way of traps into an engine."""

    def take(self, event: TrapEvent) -> None:
        """A trap has come."""

    def abandon(self, event: TrapEvent) -> None:
        """Nobody waits for this trap any more."""


class _Lane:
    """The last trap of one vCPU."""

    __slots__ = ("answer", "backend", "event", "gives_up", "prefetched")

    event: TrapEvent
    gives_up: float
    """When the vCPU goes on by itself, on the clock of `time.monotonic`."""
    answer: Answer | Native | None
    backend: TakesTraps | None
    """Which engine is asked."""
    prefetched: tuple[tuple[int, bytes], ...]
    """Physical memory that came along with a trap that is not answered: address and bytes."""


class _Access:
    __slots__ = ("arrived", "error", "frame", "reply")

    def __init__(self, frame: Read | Write) -> None:
        self.frame = frame
        self.arrived = anyio.Event()
        self.reply: Memory | None = None


class Session:
    """What a server remembers of one run of one VM. For one event loop."""

    def __init__(
        self,
        hello: Hello,
        owner: str,
        *,
        vcpus: int,
        repeated: Repeated = "refuse",
        fallback: BridgeResponse[object] | None = None,
    ) -> None:
        """`hello` has been checked. Raises `UnknownArchitectureError` where it was not."""
        self.id: bytes = hello.session
        self.vm: str = hello.vm
        self.owner = owner
        """Who may go on with it: the peer that began it."""
        self.incarnation: bytes = secrets.token_bytes(16)
        """The id of what is remembered here, which a restart of the server would not know."""
        self.other_hypercalls: bool = hello.other_hypercalls
        self.architecture: Architecture[Any] = architecture_named(
            hello.architecture, hello.architecture_version
        )
        self.counts: SessionCounts = SessionCounts()
        self.guest: GuestEnd | None = None
        """How the guest ended, when it has."""
        self.ended_by_itself: bool = False
        """Its agent has said END."""
        self.over: anyio.Event = anyio.Event()
        """The guest has ended, or its agent did not come back."""
        self.events: SessionEvents = SessionEvents()
        """What taps see of it."""
        self.link: Link | None = None
        self.away_since: float = _clock()
        """When the last connection was lost."""
        self.route: Callable[[TrapEvent], TakesTraps | None] = lambda _: None
        """Which backend takes a trap; `None`: the server stops."""
        self._layout = layout_of(self.architecture)
        self._vcpus = vcpus
        self._repeated = repeated
        self._fallback = fallback
        self._lanes: dict[int, _Lane] = {}
        self._open = 0
        self._prefetched = 0
        self._accesses: dict[int, _Access] = {}
        self._numbers = itertools.count(1)
        self._small = anyio.Semaphore(MAX_ACCESSES, fast_acquire=True)
        self._large = anyio.Semaphore(MAX_LARGE_ACCESSES, fast_acquire=True)
        self._logged = False

    # --- the connection -------------------------------------------------------------

    def attach(self, link: Link) -> None:
        """Go on over this connection; a previous one is closed."""
        if self.link is not None:
            self.link.close()
            self._happened(SessionEventKind.LOST, "another connection has taken its place")
        self.link = link
        self.counts.connections += 1
        first = self.events.last is None
        self._happened(SessionEventKind.CONNECTED if first else SessionEventKind.BACK)
        for access in self._accesses.values():
            self._ask(access.frame)

    def detach(self, link: Link) -> None:
        """This connection is lost."""
        if self.link is link:
            self.link = None
            self.away_since = _clock()
            self._happened(SessionEventKind.LOST)

    @property
    def open_traps(self) -> int:
        """Traps that are not answered."""
        return self._open

    def take(self, frame: FromAgent) -> None:
        """A frame has come. Raises `WireError` for one that must not."""
        if type(frame) is Trap:
            self.take_trap(frame)
        elif type(frame) is Memory:
            access = self._accesses.get(frame.access)
            if access is not None:
                access.reply = frame
                access.arrived.set()
        elif type(frame) is Ping:
            # Together with what follows: a peer that sends nothing else gets few packets.
            if self.link is not None:
                self.link.post(_PONG, later=True)
        elif type(frame) is Cancel:
            self._cancel(frame.seq)
        elif type(frame) is End:
            self.ended_by_itself = True
            self.end(
                GuestEnd(
                    tuple(
                        VcpuEnd(each.vcpu, each.reason, each.detail, each.registers)
                        for each in frame.vcpus
                    )
                )
            )
            self._post(_ENDED)
        else:
            raise WireError(f"{type(frame).__name__.upper()} where it must not be")

    def end(self, guest: GuestEnd, given_up: str | None = None) -> None:
        """No trap will come any more; `given_up` says why, if the guest has not ended by itself."""
        if not self.over.is_set():
            self.guest = guest
            if given_up is None:
                self._happened(SessionEventKind.ENDED)
            else:
                self._happened(SessionEventKind.GIVEN_UP, given_up)
            self.over.set()
            for lane in self._lanes.values():
                if lane.answer is None and lane.backend is not None:
                    lane.backend.abandon(lane.event)

    def give_up_agent(self, keep: float, late: float = 0.0) -> None:
        """End the session if its agent has been away for `keep` seconds, not counting `late` more
        of them, in which it could not come back: the loop stood still."""
        self.away_since += late
        if self.link is None and _clock() - self.away_since >= keep:
            self.lose(f"the agent did not come back within {keep:g} s")

    def lose(self, why: str) -> None:
        """The agent is given up."""
        vcpus = sorted(self._lanes) or [0]
        self.end(GuestEnd(tuple(VcpuEnd(vcpu, "lost", why) for vcpu in vcpus)), why)

    def _happened(self, kind: SessionEventKind, reason: str | None = None) -> None:
        if not self.over.is_set():
            self.events.add(SessionEvent(self.vm, kind, self.id.hex(), self.owner, reason))

    def _post(self, frame: Answer | Native | Returned | Ended) -> None:
        if self.link is not None:
            self.link.post(frame)

    # --- traps ----------------------------------------------------------------------

    def take_trap(self, frame: Trap) -> None:
        """A trap has come. Raises `WireError` for one that must not."""
        lane = self._lanes.get(frame.vcpu)
        gives_up = math.inf if frame.left == NO_DEADLINE else _clock() + frame.left / 1000
        if lane is not None:
            last = lane.event.seq
            if frame.seq <= last:
                if frame.seq == last:
                    self._take_again(lane, gives_up)
                return
            if lane.answer is None:
                self._forsake(lane)
        elif len(self._lanes) >= self._vcpus:
            raise WireError(f"more than {self._vcpus} vCPUs")
        size = sum(len(data) for _, data in frame.memory) if frame.memory else 0
        if size > MAX_PREFETCHED_PER_TRAP:
            raise WireError(f"more than {MAX_PREFETCHED_PER_TRAP} bytes came with a trap")
        event = trap_event(frame, self.vm, self._layout)
        if lane is None:
            lane = self._lanes[frame.vcpu] = _Lane()
        lane.event = event
        lane.gives_up = gives_up
        lane.prefetched = ()
        if size and self._prefetched + size <= MAX_PREFETCHED:
            lane.prefetched = frame.memory
            self._prefetched += size
        lane.answer = lane.backend = None
        self._open += 1
        if frame.elsewhere and self._repeated == "refuse":
            self._refuse(lane)
            return
        backend = self.route(event)
        if backend is None:
            self.give_back(event)
            return
        lane.backend = backend
        backend.take(event)

    def _take_again(self, lane: _Lane, gives_up: float) -> None:
        self.counts.repeated += 1
        lane.gives_up = gives_up
        if lane.answer is not None:
            self._post(lane.answer)

    def _refuse(self, lane: _Lane) -> None:
        event = lane.event
        self.counts.refused += 1
        # One warning is enough: there may be one of each vCPU.
        log.log(
            logging.DEBUG if self._logged else logging.WARNING,
            "vm %s: trap %d was sent to a server that is gone: it may have run there, so it is"
            " not run here; the guest gets the fallback",
            self.vm,
            event.seq,
        )
        self._logged = True
        self.answer(event, write_response(event, self._fallback))

    def give_back(self, event: TrapEvent) -> None:
        """The server stops, and no handler was asked: the agent is to send the trap again."""
        lane = self._lanes.get(event.vcpu)
        if lane is not None and lane.event.seq == event.seq and lane.answer is None:
            del self._lanes[event.vcpu]
            self._close(lane)
            self.counts.returned += 1
            self._post(Returned(event.seq))

    def _forsake(self, lane: _Lane) -> None:
        """The vCPU went on without an answer."""
        if lane.backend is not None:
            lane.backend.abandon(lane.event)
        if lane.answer is None:
            self._close(lane)

    def _close(self, lane: _Lane) -> None:
        """Its trap is not open any more."""
        self._open -= 1
        self._drop_prefetched(lane)

    def _drop_prefetched(self, lane: _Lane) -> None:
        if lane.prefetched:
            self._prefetched -= sum(len(data) for _, data in lane.prefetched)
            lane.prefetched = ()

    def _cancel(self, seq: int) -> None:
        for lane in self._lanes.values():
            if lane.event.seq == seq and lane.answer is None and lane.backend is not None:
                lane.backend.abandon(lane.event)

    def kept_answer(self, vcpu: int, seq: int) -> Answer | Native | Returned | None:
        """What became of a trap that was the last one of its vCPU; `None`: it is not answered."""
        lane = self._lanes.get(vcpu)
        return Returned(seq) if lane is None or lane.event.seq != seq else lane.answer

    def answer(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send an answer, and remember it; dropped when its trap is not pending any more."""
        lane = self._lanes.get(event.vcpu)
        if lane is None or lane.event.seq != event.seq or lane.answer is not None:
            self.counts.late += 1
            return
        answer = lane.answer = answer_frame(event.seq, writes)
        self._close(lane)
        if self.link is not None:
            # The last one of those that are open goes out with all before it.
            self.link.post(answer, later=self._open > 0)

    def give_up_overdue(self) -> float:
        """Abandon the traps whose vCPUs went on; returns when to look again."""
        now, following = _clock(), math.inf
        for lane in self._lanes.values():
            if lane.answer is not None or lane.backend is None:
                continue
            if lane.gives_up <= now:
                lane.gives_up = math.inf
                lane.backend.abandon(lane.event)
            else:
                following = min(following, lane.gives_up)
        return following

    # --- memory ---------------------------------------------------------------------

    async def read(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises `GuestMemoryError`."""
        lane = self._lanes.get(event.vcpu)
        if lane is not None and lane.event.seq == event.seq and lane.prefetched:
            for start, data in lane.prefetched:
                if start <= address and address + size <= start + len(data):
                    return data[address - start : address - start + size]
        reply = await self._access(Read(next(self._numbers), event.seq, address, size), size)
        if len(reply.data) != size:
            raise GuestMemoryError(address, f"{len(reply.data)} bytes came, not {size}")
        return reply.data

    async def write(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data`, or nothing. Raises `GuestMemoryError`."""
        lane = self._lanes.get(event.vcpu)
        if lane is not None:
            # What came along is from before this write: the handler has to read what it wrote.
            self._drop_prefetched(lane)
        await self._access(Write(next(self._numbers), event.seq, address, data), len(data))

    def _ask(self, frame: Read | Write) -> None:
        if self.link is not None:
            if isinstance(frame, Read):
                # Never lowered again: the reply may come after the handler was cancelled.
                self.link.allow(FRAME_LIMIT + frame.size)
            self.link.post(frame)

    async def _access(self, frame: Read | Write, size: int) -> Memory:
        async with self._small if size <= SMALL_ACCESS else self._large:
            access = _Access(frame)
            self._accesses[frame.access] = access
            try:
                self._ask(frame)
                await access.arrived.wait()
            finally:
                del self._accesses[frame.access]
        reply = access.reply
        assert reply is not None
        if reply.error is not None:
            raise GuestMemoryError(frame.address, reply.error)
        return reply


Admit: TypeAlias = Callable[[Hello, str], Awaitable[tuple[Session, Welcome]]]
"""Makes or finds the session of a peer that said HELLO and proved who it is. Raises
`RefusedError`."""
