"""The bounded queue between a backend and the workers: one ordered lane per vCPU.

Rules:

- A trap is *ready* when no earlier trap of its vCPU is unanswered; else it waits in
  its lane's backlog until `release`. So one vCPU's traps are answered in order, and
  vCPUs do not wait for each other.
- Queued traps, ready or not, are bounded by `capacity`. `put` waits for room, which
  comes in batches of half the capacity: a task switch is then paid per batch.
- One waiting worker at a time is woken. It takes traps until one makes it wait, and
  only then is the next one woken (`Workers._promote`).
"""

from collections import deque
from collections.abc import Callable
from itertools import chain

import anyio

from vmibridge.aio.loops import parking
from vmibridge.aio.parking import Parking
from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.bounded_sink import BoundedSink
from vmibridge.vm.trap import TrapEvent


class Lanes(BoundedSink):
    """See the module. For one event loop; not for threads."""

    def __init__(
        self, capacity: int, on_abandoned: Callable[[TrapEvent], None] = lambda _: None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a queue holds at least one trap, got {capacity}")
        super().__init__()
        self._capacity = capacity
        self._on_abandoned = on_abandoned
        self.abandoned: set[int] = set()
        """Sequence numbers of queued traps whose answer is not awaited any more."""
        self._queued = 0
        self._ready: deque[TrapEvent] = deque()
        self._busy: dict[int, deque[TrapEvent] | None] = {}
        """By vCPU, as long as a trap of its is unanswered; `None`: and no other waits."""
        self._idle: list[Parking] = []
        self._spare: list[Parking] = []
        self._waking = False
        self._closed = False
        self._quiet: anyio.Event | None = None

    @property
    def has_ready(self) -> bool:
        """Whether a trap can be taken now."""
        return bool(self._ready)

    @property
    def ready(self) -> int:
        """How many traps can be taken now."""
        return len(self._ready)

    @property
    def idle(self) -> int:
        """How many workers wait for a trap, a woken one not included."""
        return len(self._idle)

    @property
    def attended(self) -> bool:
        """Whether a worker waits for the next trap, or is on its way to it."""
        return self._waking or bool(self._idle)

    def put_nowait(self, event: TrapEvent) -> None:
        """Raises `anyio.WouldBlock` when full, `TrapQueueClosedError` when closed."""
        if self._closed:
            raise TrapQueueClosedError("the server takes no more traps")
        if self._queued >= self._capacity:
            raise anyio.WouldBlock
        self._queued += 1
        vcpu, busy = event.vcpu, self._busy
        if vcpu not in busy:
            # Without a backlog: most lanes have none, and to make one costs as much as the rest.
            busy[vcpu] = None
            self._ready.append(event)
            if not self._waking:
                self.wake()
        elif (backlog := busy[vcpu]) is None:
            busy[vcpu] = deque((event,))
        else:
            backlog.append(event)

    def abandon(self, event: TrapEvent) -> None:
        """The answer to this trap is not awaited any more."""
        # By identity, and the latest first: an agent that waits for no answer abandons each trap
        # with the next one.
        queued = chain(reversed(self._busy.get(event.vcpu) or ()), reversed(self._ready))
        if any(each is event for each in queued):
            self.abandoned.add(event.seq)
        else:
            self._on_abandoned(event)

    def was_abandoned(self, event: TrapEvent) -> bool:
        """Whether a trap that was taken was abandoned before; asked once."""
        if event.seq in self.abandoned:
            self.abandoned.remove(event.seq)
            return True
        return False

    def wake(self) -> bool:
        """Wake the worker that has waited least, unless one is waking; `False` if there is none."""
        if not self._waking and self._idle:
            self._idle.pop().wake()
            self._waking = True
        return self._waking

    def get_nowait(self) -> TrapEvent | None:
        """The next ready trap; its vCPU's lane is busy until `release`."""
        if not self._ready:
            return None
        self._queued -= 1
        if self._room is not None and self._queued <= self._capacity // 2:
            self._wake_producers()
        return self._ready.popleft()

    async def get(self) -> TrapEvent | None:
        """Wait for the next ready trap; `None` when closed and none is left."""
        while not self._ready:
            if self._closed:
                return None
            turn = self._spare.pop() if self._spare else parking()
            self._idle.append(turn)
            try:
                await turn.wait()
            except BaseException:
                if turn in self._idle:
                    self._idle.remove(turn)
                else:
                    # Woken and cancelled: left set, no other worker would be woken any more.
                    self._waking = False
                raise
            self._waking = False
            self._spare.append(turn)
        return self.get_nowait()

    def release(self, vcpu: int) -> None:
        """The trap of this vCPU is answered; its next one, if any, becomes ready."""
        busy = self._busy
        if backlog := busy.get(vcpu):
            self._ready.append(backlog.popleft())
        elif vcpu in busy:
            del busy[vcpu]
            if self._quiet is not None and not self._busy:
                self._quiet.set()

    async def quiet(self) -> None:
        """Wait until every trap that was put has been released."""
        while self._busy:
            if self._quiet is None or self._quiet.is_set():
                self._quiet = anyio.Event()
            await self._quiet.wait()

    def close(self) -> None:
        """Take no more traps. Those that are queued can still be taken."""
        self._closed = True
        for turn in self._idle:
            turn.wake()
        self._idle.clear()
        self._wake_producers()
