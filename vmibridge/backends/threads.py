"""The hand-over between a vCPU's thread and the event loop, on either loop.

A blocking backend runs each vCPU in a thread. The thread posts its trap to the loop
and sleeps on a lock; the answer, given on the loop, opens it. There is one trap per
vCPU at a time, so one slot is enough, and nothing here can pile up.
"""

from collections import deque
from threading import Lock

import anyio

from vmibridge.aio.loops import Soon, loop_door
from vmibridge.vm.backend import TrapSink, feed, feed_held
from vmibridge.vm.trap import RegisterWrites, TrapEvent


class Handover:
    """The loop's end for all vCPUs of one backend."""

    def __init__(self, sink: TrapSink) -> None:
        """On the loop that is to serve the vCPUs."""
        self.soon: Soon = loop_door()
        self.sink = sink
        self._held: deque[tuple[VcpuSlot, TrapEvent]] = deque()
        self._arrived = anyio.Event()

    def hold(self, slot: "VcpuSlot", event: TrapEvent) -> None:
        """Keep a trap that found the queue full; its vCPU waits."""
        self._held.append((slot, event))
        self._arrived.set()

    async def feed(self) -> None:
        """Put held traps into the queue as it has room, until cancelled.

        A task of its own: what a thread posts runs outside of any task and cannot wait.
        """
        while True:
            while self._held:
                slot, event = self._held.popleft()
                await feed_held(self.sink, event, slot.refuse)
            self._arrived = anyio.Event()
            await self._arrived.wait()


class VcpuSlot:
    """Where one vCPU's thread and the loop meet."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self._answered = Lock()
        self._answered.acquire()
        self._waiting = False
        self._released = False
        self._writes: RegisterWrites | None = None

    def ask(self, event: TrapEvent) -> tuple[bool, RegisterWrites | None]:
        """In the vCPU's thread: hand a trap over, and wait for what to write.

        Whether there was an answer, and the answer; a slot that was released gives
        none. Raises `RuntimeError` when the loop is closed.
        """
        self._handover.soon(self._deliver, event)
        self._answered.acquire()
        return not self._released, self._writes

    def answer(self, writes: RegisterWrites | None) -> None:
        """On the loop: let the vCPU go on, with these writes or natively.

        Without a trap that waits, this does nothing: the slot was released before.
        """
        if self._waiting:
            self._waiting = False
            self._writes = writes
            self._answered.release()

    def release(self) -> None:
        """On the loop: let the vCPU go without an answer, now and from here on."""
        self._released = True
        self.answer(None)

    def _deliver(self, event: TrapEvent) -> None:
        self._waiting = True
        if self._released:
            return self.answer(None)
        feed(self._handover.sink, event, self._hold, self.refuse)
        return None

    def _hold(self, event: TrapEvent) -> None:
        self._handover.hold(self, event)

    def refuse(self, _event: TrapEvent) -> None:
        """On the loop: the server takes no more traps."""
        self.release()
