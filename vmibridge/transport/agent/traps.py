"""The in-flight traps of an agent: how they are sent, sent again, and answered.

- A trap is answered once. Four may want to: the server's answer, the deadline, the stop, and the
  end of its vCPU. The one that takes it out of `AgentLanes` answers it; all run on one loop.
- A trap that was sent to one incarnation, and goes to another now, is marked (`elsewhere`): a
  handler may have run for it. So it is to each further one. It is not to the first, which
  remembers it; nor after RETURNED, by which a server says that it asked no handler.
- What belongs to another incarnation is not sent: the reply to an access has the number that the
  server before gave it.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio.coroutines import DONE, first_step, go_on
from vmibridge.bridge.registers import write_response
from vmibridge.bridge.request import own_request
from vmibridge.bridge.response import BridgeResponse
from vmibridge.transport.agent.accesses import Accesses
from vmibridge.transport.agent.lanes import AgentLane, AgentLanes
from vmibridge.transport.agent.prefetch import Prefetch
from vmibridge.transport.links import AgentLink
from vmibridge.transport.wire import (
    NO_DEADLINE,
    Cancel,
    Memory,
    Read,
    TrapLayout,
    Welcome,
    Write,
    layout_of,
    milliseconds,
    trap_filter,
    trap_frame,
)
from vmibridge.vm.backend import Backend
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

_clock = time.monotonic

MARGIN = 0.25
"""Seconds that an answer may be on its way, beyond the deadline of the server."""
MAX_SECONDS = 3600.0
"""A deadline beyond that is none, and a guest has to have one."""
_QUEUE = 1024
"""Traps that may wait behind others of their vCPU."""


class AgentCounts:
    """What an agent did."""

    __slots__ = ("answered", "connections", "late", "own", "sent_again", "traps")

    def __init__(self) -> None:
        self.traps: int = 0
        self.answered: int = 0
        """By the server."""
        self.own: int = 0
        """Answered here: at the deadline, at a stop, or for a vCPU that is gone."""
        self.sent_again: int = 0
        self.late: int = 0
        """Answers that came for traps that did not wait for them any more."""
        self.connections: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {name: getattr(self, name) for name in self.__slots__}


class InFlightTraps:
    """The in-flight traps of one VM. `deadline` is that of the user, in seconds; `None`: the
    server's."""

    def __init__(self, backend: Backend, vm: str, deadline: float | None) -> None:
        self.vm = vm
        self.counts: AgentCounts = AgentCounts()
        self.lanes: AgentLanes = AgentLanes(_QUEUE, self._send_first, self._give_up)
        self.link: AgentLink | None = None
        """The connection, while there is one."""
        self._backend = backend
        self._in_flight = self.lanes.in_flight
        self._own_deadline = deadline
        self._deadline = MAX_SECONDS
        self._left = 0
        self._fallback = BridgeResponse[object]()
        self._filter = TrapFilter()
        self._layout: TrapLayout
        self._vcpus = 0
        self._incarnation = b""
        self._accesses = Accesses(backend)
        self._prefetch = Prefetch(backend, ())
        self._errands: deque[Callable[[], Coroutine[Any, Any, None]]] = deque()
        self._errand = anyio.Event()

    def go_on_with(self, link: AgentLink, welcome: Welcome) -> None:
        """Send the traps in flight, and those that come, to a server that has said WELCOME."""
        if welcome.incarnation != self._incarnation:
            self._accesses.forget()
        self._incarnation = welcome.incarnation
        self._vcpus = welcome.vcpus
        self._layout = layout_of(self._backend.architecture)
        self._fallback = BridgeResponse(*welcome.fallback)
        self._filter = trap_filter(welcome)
        self._prefetch = Prefetch(self._backend, welcome.reads)
        deadline = (
            MAX_SECONDS if welcome.timeout == NO_DEADLINE else welcome.timeout / 1000 + MARGIN
        )
        self._deadline = min(
            deadline if self._own_deadline is None else self._own_deadline, MAX_SECONDS
        )
        self._left = milliseconds(self._deadline)
        self.link = link
        self._send_again(link)

    def _send_first(self, lane: AgentLane) -> None:
        self.counts.traps += 1
        event = lane.event
        lane.deadline = _clock() + self._deadline
        if event.vcpu > 0xFFFF or len(self._in_flight) > self._vcpus:
            log.warning("vm %s: more vCPUs than the server takes: %d", self.vm, self._vcpus)
            self._give_up(event.seq)
        elif self._prefetch.wanted and self._prefetch.wants(event):
            self._go(partial(self._send_with_memory, lane, event))
        elif self.link is not None:
            self._send(self.link, lane, self._left)

    async def _send_with_memory(self, lane: AgentLane, event: TrapEvent) -> None:
        memory = await self._prefetch.read(event)
        # It may have been sent and answered by now, and the next one have taken its place.
        if self._in_flight.get(event.seq) is lane:
            lane.memory = memory
            if self.link is not None:
                self._send(self.link, lane, self._left_of(lane))

    def _send(self, link: AgentLink, lane: AgentLane, left: int) -> None:
        sent_to = lane.sent_to
        elsewhere = sent_to is not None and sent_to != self._incarnation
        try:
            frame = trap_frame(lane.event, left, elsewhere, lane.memory, self._layout)
        except ValueError as error:
            log.warning("vm %s: %s", self.vm, error)
            self._give_up(lane.event.seq)
            return
        if not elsewhere:
            # Else the first one stays: the trap is marked for every other one.
            lane.sent_to = self._incarnation
        link.post(frame)

    def _left_of(self, lane: AgentLane) -> int:
        return milliseconds(lane.deadline - _clock())

    def _send_again(self, link: AgentLink) -> None:
        """Over a new connection, in the order of the traps."""
        for lane in list(self._in_flight.values()):
            if lane.sent_to is not None:
                self.counts.sent_again += 1
            self._send(link, lane, self._left_of(lane))

    def answer(self, seq: int, writes: RegisterWrites | None) -> Coroutine[Any, Any, None] | None:
        """Answer a trap that waits, once; returns what there is to wait for."""
        lane = self.lanes.take(seq)
        if lane is None:
            self.counts.late += 1
            return None
        self.counts.answered += 1
        try:
            body = self._backend.resume(lane.event, writes)
            # As `first_step` does; a call less for every trap.
            wish = body.send(None)
        except StopIteration:
            pass
        except Exception:
            log.exception("vm %s: the answer to trap %d was not written", self.vm, seq)
        else:
            return self._finish(lane, seq, go_on(body, wish))
        self.lanes.release(lane)
        return None

    async def _finish(self, lane: AgentLane, seq: int, rest: Awaitable[None]) -> None:
        try:
            await rest
        except Exception:
            log.exception("vm %s: the answer to trap %d was not written", self.vm, seq)
        finally:
            self.lanes.release(lane)

    # --- answers that are given here ------------------------------------------------

    def _give_up(self, seq: int) -> None:
        if self.link is not None:
            self.link.post(Cancel(seq))
        self._go(partial(self._answer_here, seq))

    async def answer_all(self) -> None:
        """Answer all that is in flight, without the server."""
        for seq in list(self._in_flight):
            await self._answer_here(seq)

    async def _answer_here(self, seq: int) -> None:
        lane = self._in_flight.get(seq)
        if lane is not None:
            self.counts.own += 1
            # `answer` counts it as the server's.
            self.counts.answered -= 1
            rest = self.answer(seq, self._fallback_for(lane.event))
            if rest is not None:
                await rest

    def _fallback_for(self, event: TrapEvent) -> RegisterWrites | None:
        """As the server would have it; what may not be ours runs natively."""
        others = self._backend.other_hypercalls
        if own_request(event, self._filter, other_hypercalls=others) is None:
            return None
        return write_response(event, self._fallback)

    async def watch(self) -> None:
        """Keep the deadlines. A trap that comes while this sleeps is due later than it wakes."""
        while True:
            now = _clock()
            for seq, lane in list(self._in_flight.items()):
                if lane.deadline <= now:
                    log.warning(
                        "vm %s: trap %d has no answer within %g s: the guest gets the fallback",
                        self.vm,
                        seq,
                        self._deadline,
                    )
                    self._give_up(seq)
                    # It is answered by a task, which may wait: once is enough.
                    lane.deadline = math.inf
            following = min((lane.deadline for lane in self._in_flight.values()), default=math.inf)
            await anyio.sleep(max(0.0, min(following - _clock(), self._deadline)))

    # --- what a server asks for -------------------------------------------------------

    def _post(self, incarnation: bytes, frame: Memory) -> None:
        # Another incarnation numbers its accesses from 1 again: this is none of its own.
        if self.link is not None and self._incarnation == incarnation:
            self.link.post(frame)

    def access(self, frame: Read | Write) -> Awaitable[None] | None:
        """Guest memory for a trap that waits; returns what there is to wait for."""
        lane = self._in_flight.get(frame.seq)
        post = partial(self._post, self._incarnation)
        body = self._accesses.do(frame, None if lane is None else lane.event, post)
        wish = first_step(body)
        return None if wish is DONE else go_on(body, wish)

    def take_back(self, seq: int) -> None:
        """The server stops, and has asked no handler: as if it had not been sent."""
        lane = self._in_flight.get(seq)
        if lane is not None:
            lane.sent_to = None

    def _go(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a task, from anywhere: a trap of a vCPU's thread comes outside of any task."""
        self._errands.append(task)
        self._errand.set()

    async def run_errands(self, tasks: TaskGroup) -> None:
        """Start what `_go` was given, in tasks of this group, until cancelled."""
        while True:
            while self._errands:
                tasks.start_soon(self._errands.popleft())
            self._errand = anyio.Event()
            await self._errand.wait()
