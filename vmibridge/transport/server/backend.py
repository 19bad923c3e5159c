"""A VM whose agent is elsewhere, as the backend of one engine, which is that of one handler set.

- `take` is called by the session, outside of any task of the engine. So a trap that finds the
  engine's queue full is held here, and `run` feeds it; the order of traps stays.
- Every trap that was taken is answered (`resume`), given back, or abandoned before the engine had
  it, once. `unanswered` counts them, and a retired handler set does not end before it is 0.
- What is held is bounded by the vCPUs of the session: of each at most one trap is pending.
- That the agent is away is no error of guest memory: an access waits for it. That the session is
  over is one.
"""

import time
from collections import deque

import anyio

from vmibridge.bridge.outcome import GONE
from vmibridge.errors import GuestMemoryError
from vmibridge.transport.session import Session
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd, feed, feed_held
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

_clock = time.monotonic


class SessionBackend(Backend):
    """The VM of one session, for one engine."""

    session: Session

    def __init__(self, vm: str, session: Session | None = None) -> None:
        super().__init__(vm)
        if session is not None:
            self.session = session
            self.other_hypercalls: bool = session.other_hypercalls
            self.architecture = session.architecture
        self.running: anyio.Event = anyio.Event()
        """An engine takes its traps."""
        self.unanswered: int = 0
        """Traps that were given to the engine."""
        self._sink: TrapSink | None = None
        self._held: deque[TrapEvent] = deque()
        self._head_abandoned = False
        self._poked = anyio.Event()
        self._over = False

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Until the guest has ended, or `stop`."""
        self._sink = sink
        self.running.set()
        with self.session.events.watched(self.on_session_event):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                tasks.start_soon(self._end_with_session)
                while not self._over:
                    self._poked = anyio.Event()
                    await self._feed(sink)
                    if not self._over:
                        await self._poked.wait()
                tasks.cancel_scope.cancel()
        for event in self._held:
            self._give_back(event)
        self._held.clear()
        return self.session.guest or GuestEnd((VcpuEnd(0, "stopped", "the server stopped"),))

    async def _feed(self, sink: TrapSink) -> None:
        while self._held and not self._over:
            # It stays at the head until the engine has it, so that later traps line up behind it.
            event = self._held[0]
            self._head_abandoned = False
            await feed_held(sink, event, self._give_back)
            self._held.popleft()
            if self._head_abandoned:
                # Before any worker can have it: no handler runs for an abandoned trap.
                sink.abandon(event)

    async def _end_with_session(self) -> None:
        await self.session.over.wait()
        self.stop()

    async def _watch(self) -> None:
        # Traps come all the time, and the watch is not poked: so it looks now and then.
        while True:
            following = self.session.give_up_overdue()
            await anyio.sleep(max(0.01, min(following - _clock(), 0.25)))

    def take(self, event: TrapEvent) -> None:
        """A trap has come."""
        self.unanswered += 1
        if self._sink is None or self._held:
            self._hold(event)
        else:
            feed(self._sink, event, self._hold, self._give_back)

    def _hold(self, event: TrapEvent) -> None:
        self._held.append(event)
        self._poked.set()

    def _give_back(self, event: TrapEvent) -> None:
        self.unanswered -= 1
        self.session.give_back(event)

    def give_back(self, event: TrapEvent) -> bool:
        """The server stops: the agent sends the trap to the one that follows."""
        self._give_back(event)
        return True

    def abandon(self, event: TrapEvent) -> None:
        """Nobody waits for this trap any more."""
        if self._held and self._held[0] is event:
            self._head_abandoned = True
            return
        for at in reversed(range(len(self._held))):
            if self._held[at] is event:
                del self._held[at]
                self.unanswered -= 1
                self.session.answer(event, None)
                return
        if self._sink is not None:
            self._sink.abandon(event)

    def stop(self) -> None:
        """Take no more traps; the guest is with the agent, and goes on."""
        self._over = True
        self._poked.set()

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer. Never waits."""
        self.unanswered -= 1
        self.session.answer(event, writes)

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Asks the agent, and waits for it while it is away."""
        self._check(address)
        return await self.session.read(event, address, size)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """Asks the agent, and waits for it while it is away."""
        self._check(address)
        await self.session.write(event, address, data)

    def _check(self, address: int) -> None:
        if self.session.over.is_set():
            raise GuestMemoryError(address, GONE)
