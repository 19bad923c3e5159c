"""The lanes of an agent: of each vCPU one trap in flight, and those that wait behind it.

- A trap is *in flight* (`in_flight`) from its first sending until it is taken out to be
  answered, which is once: the second to try finds nothing.
- While one trap of a vCPU is in flight, later ones wait in the backlog of its lane. So the order of
  a vCPU holds, and a server has to remember one answer a vCPU. All backlogs together hold `most`.

As in `engine.lanes`, but a ready trap is not handled here: it is sent.
"""

from collections import deque
from collections.abc import Callable

import anyio

from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.bounded_sink import BoundedSink
from vmibridge.vm.trap import TrapEvent


class AgentLane:
    """One vCPU: its trap in flight, and its backlog."""

    __slots__ = ("backlog", "busy", "deadline", "event", "memory", "sent_to")

    event: TrapEvent
    """The trap in flight; when there is none, the last one."""
    deadline: float
    """When that is answered without the server."""
    sent_to: bytes | None
    """The incarnation that it was sent to first; `None`: to none, or it was given back."""
    memory: tuple[tuple[int, bytes], ...]
    """Guest memory that travels with it: physical address and bytes."""

    def __init__(self) -> None:
        self.busy: bool = False
        """A further trap has to wait."""
        self.backlog: deque[TrapEvent] = deque()


class AgentLanes(BoundedSink):
    """See the module; the sink of a backend. `send` is called with a lane whose next trap is
    in flight from now on, `give_up` with the number of a trap whose vCPU is gone."""

    def __init__(
        self, most: int, send: Callable[[AgentLane], None], give_up: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.in_flight: dict[int, AgentLane] = {}
        """By the sequence number of the trap, in the order of sending."""
        self._by_vcpu: dict[int, AgentLane] = {}
        self._send = send
        self._give_up = give_up
        self._max_queued = most
        self._queued = 0
        self._quiet: anyio.Event | None = None
        self._answering = 0
        self._closed = False

    def put_nowait(self, event: TrapEvent) -> None:
        """Raises `anyio.WouldBlock` when full, `TrapQueueClosedError` when closed."""
        if self._closed:
            raise TrapQueueClosedError("the agent takes no more traps")
        lane = self._by_vcpu.get(event.vcpu)
        if lane is None:
            lane = self._by_vcpu[event.vcpu] = AgentLane()
        elif lane.busy:
            if self._queued >= self._max_queued:
                raise anyio.WouldBlock
            self._queued += 1
            lane.backlog.append(event)
            return
        self._begin(lane, event)

    def abandon(self, event: TrapEvent) -> None:
        """The vCPU of a trap is gone: the trap is answered here, and the answer is not read."""
        if event.seq in self.in_flight:
            self._give_up(event.seq)

    def _begin(self, lane: AgentLane, event: TrapEvent) -> None:
        lane.busy = True
        lane.event = event
        lane.sent_to = None
        lane.memory = ()
        self.in_flight[event.seq] = lane
        self._send(lane)

    def take(self, seq: int) -> AgentLane | None:
        """Take a trap out to answer it; `None`: it is not in flight, or was taken out before.

        The caller must answer it, and then call `release`.
        """
        lane = self.in_flight.pop(seq, None)
        if lane is not None:
            self._answering += 1
            if not lane.backlog:
                # The vCPU goes on as soon as the backend has the answer: its next trap may come
                # before `resume` has returned here, and must not wait behind it.
                lane.busy = False
        return lane

    def release(self, lane: AgentLane) -> None:
        """The answer is written, or could not be: the next trap of the vCPU is sent."""
        self._answering -= 1
        if lane.backlog:
            self._queued -= 1
            # Room comes in batches, so that a vCPU that waits costs a task switch once a batch.
            if self._room is not None and self._queued <= self._max_queued // 2:
                self._wake_producers()
            self._begin(lane, lane.backlog.popleft())
        elif self._quiet is not None and not self.in_flight and not self._answering:
            self._quiet.set()

    async def quiet(self) -> None:
        """Wait until every trap that was put is answered."""
        while self.in_flight or self._answering:
            if self._quiet is None or self._quiet.is_set():
                self._quiet = anyio.Event()
            await self._quiet.wait()

    def close(self) -> None:
        """Take no more traps."""
        self._closed = True
        self._wake_producers()
