"""When handlers begin, and how long their traps were queued: for taps with `handler_began`.

Without such a tap nothing of this exists: `lanes_for` gives lanes that read no clock and call
nothing.

A trap that waits for room in a full queue is queued, too, as far as its backend says by `put` that
it waits. The time of a trap ends when a worker takes it, and from there on its outcome counts
(`Outcome.duration`): so the two add up to what the guest has waited, but for the way to and from
the backend.
"""

from collections.abc import Callable
from typing import TypeAlias

from vmibridge.bridge.dispatch import Entry
from vmibridge.engine.lanes import Lanes
from vmibridge.engine.request import PENDING, Worker
from vmibridge.engine.taps import HandlerBegan
from vmibridge.engine.vm_taps import Taps
from vmibridge.vm.trap import TrapEvent

Began: TypeAlias = Callable[[Worker, Entry], None]
"""Called when the handler of an entry is called for the request of a worker, right before it is."""


def lanes_for(
    taps: Taps | None,
    capacity: int,
    on_abandoned: Callable[[TrapEvent], None],
    clock: Callable[[], float],
) -> tuple[Lanes, Began | None]:
    """The lanes of a VM, and what is called when a handler begins."""
    if taps is None or taps.handler_began is None:
        return Lanes(capacity, on_abandoned), None
    lanes = TimedLanes(capacity, on_abandoned, clock)
    return lanes, Beginnings(lanes, taps.handler_began, clock)


def nanoseconds(seconds: float) -> int:
    """A duration."""
    return max(0, round(seconds * 1e9))


class TimedLanes(Lanes):
    """Lanes that know how long each trap was in the queue."""

    def __init__(
        self,
        capacity: int,
        on_abandoned: Callable[[TrapEvent], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(capacity, on_abandoned)
        self._clock = clock
        self.queued: dict[int, int] = {}
        """By vCPU: nanoseconds that the trap was queued which was taken last. Who takes it out
        has it alone."""
        self._since: dict[int, float] = {}

    def put_nowait(self, event: TrapEvent) -> None:
        super().put_nowait(event)
        # No worker can have taken it yet. One that has waited for room has its time already.
        self._since.setdefault(event.seq, self._clock())

    async def put(self, event: TrapEvent) -> None:
        self._since[event.seq] = self._clock()
        try:
            await super().put(event)
        except BaseException:
            self._since.pop(event.seq, None)
            raise

    def get_nowait(self) -> TrapEvent | None:
        event = super().get_nowait()
        if event is not None:
            now = self._clock()
            self.queued[event.vcpu] = nanoseconds(now - self._since.pop(event.seq, now))
        return event


class Beginnings:
    """Tells taps of each handler that begins."""

    def __init__(
        self,
        lanes: TimedLanes,
        tell: Callable[[HandlerBegan], None],
        clock: Callable[[], float],
    ) -> None:
        self._lanes = lanes
        self._tell = tell
        self._clock = clock

    def __call__(self, worker: Worker, entry: Entry) -> None:
        request, event = worker.request, worker.context.event
        code = request.packet.method
        known = None if entry.handler is None else entry.handler.methods.get(code)
        if request.state in PENDING:
            # Passed on after the guest was told to wait. Its vCPU may have another trap by now,
            # whose time is not that of this one.
            first, queued = request.first_seq, None
        else:
            first, queued = event.seq, self._lanes.queued.pop(event.vcpu, None)
        self._tell(
            HandlerBegan(
                event,
                first,
                request.packet,
                entry.name,
                None if known is None else known.name,
                queued,
                nanoseconds(self._clock() - request.started),
            )
        )
