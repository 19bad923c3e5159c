"""The traps of one VM that wait for an answer: one in flight a vCPU, others behind it.

A trap is in `pending` from its departure until somebody takes it out to answer it, and that
is once. `most` bounds those that wait behind others of their vCPU.
"""

from collections import deque
from collections.abc import Callable

import anyio

from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.trap import TrapEvent


class Flight:
    """The trap of one vCPU."""

    __slots__ = ("backlog", "busy", "deadline", "event", "memory", "sent_to")

    event: TrapEvent
    deadline: float
    """When it is answered without the server."""
    sent_to: bytes | None
    """The memory of the server that it was sent to last."""
    memory: tuple[tuple[int, bytes], ...]
    """Guest memory that travels with it."""

    def __init__(self) -> None:
        self.busy: bool = False
        self.backlog: deque[TrapEvent] = deque()


class Flights:
    """See the module; the sink of a backend. `depart` is called with each flight when its turn
    has come, `give_up` with the number of a trap whose vCPU is gone."""

    def __init__(
        self, most: int, depart: Callable[[Flight], None], give_up: Callable[[int], None]
    ) -> None:
        self.pending: dict[int, Flight] = {}
        """By the sequence number of the trap, in the order of departure."""
        self._lanes: dict[int, Flight] = {}
        self._depart = depart
        self._give_up = give_up
        self._most = most
        self._queued = 0
        self._room: anyio.Event | None = None
        self._quiet: anyio.Event | None = None
        self._answering = 0
        self._closed = False

    def put_nowait(self, event: TrapEvent) -> None:
        """Raises `anyio.WouldBlock` when full, `TrapQueueClosedError` when closed."""
        if self._closed:
            raise TrapQueueClosedError("the agent takes no more traps")
        flight = self._lanes.get(event.vcpu)
        if flight is None:
            flight = self._lanes[event.vcpu] = Flight()
        elif flight.busy:
            if self._queued >= self._most:
                raise anyio.WouldBlock
            self._queued += 1
            flight.backlog.append(event)
            return
        self._begin(flight, event)

    async def put(self, event: TrapEvent) -> None:
        """Wait for room. Raises `TrapQueueClosedError`. Cancelled, nothing was put."""
        while True:
            try:
                return self.put_nowait(event)
            except anyio.WouldBlock:
                if self._room is None:
                    self._room = anyio.Event()
                await self._room.wait()

    def abandon(self, event: TrapEvent) -> None:
        """The vCPU of a trap is gone: it is answered at once, by nobody in particular."""
        if event.seq in self.pending:
            self._give_up(event.seq)

    def _begin(self, flight: Flight, event: TrapEvent) -> None:
        flight.busy = True
        flight.event = event
        flight.sent_to = None
        flight.memory = ()
        self.pending[event.seq] = flight
        self._depart(flight)

    def take(self, seq: int) -> Flight | None:
        """Whoever gets it has to answer it, and call `landed`; `None`: somebody else did."""
        flight = self.pending.pop(seq, None)
        if flight is not None:
            self._answering += 1
            if not flight.backlog:
                # Its next trap may come before this answer has been seen to its end.
                flight.busy = False
        return flight

    def landed(self, flight: Flight) -> None:
        """The answer is written."""
        self._answering -= 1
        if flight.backlog:
            self._queued -= 1
            if self._room is not None and self._queued <= self._most // 2:
                self._room.set()
                self._room = None
            self._begin(flight, flight.backlog.popleft())
        elif self._quiet is not None and not self.pending and not self._answering:
            self._quiet.set()

    async def quiet(self) -> None:
        """Wait until every trap that was put is answered."""
        while self.pending or self._answering:
            if self._quiet is None or self._quiet.is_set():
                self._quiet = anyio.Event()
            await self._quiet.wait()

    def close(self) -> None:
        """Take no more traps."""
        self._closed = True
        if self._room is not None:
            self._room.set()
            self._room = None
