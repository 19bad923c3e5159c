"""The stage of a `Session`: frames in, frames out, an engine that a playbook plays, and a clock.

| step | is |
|---|---|
| `!! connects`, `!! lost` | the connection, or `!! connects second` a connection by name |
| `!! answers 1 rax=7`, `!! native 1` | what the engine says of a trap |
| `!! gives-back 1` | the engine was not asked, and the server stops |
| `!! reads 1 0x5000 4`, `!! writes 1 0x5000 "abcd"` | a handler accesses guest memory |
| `!! gives-up 7` | the handler that waits for access 7 is cancelled |
| `!! passes 0.05` | seconds go by, and overdue traps are given up |
| `!! stops` | no engine takes traps any more |
| `!! forsaken "why"` | the agent is given up |
| `** takes 1`, `** abandons 1` | what the engine is told |
| `** has "abcd"`, `** wrote`, `** fails "why"` | what an access comes to |
| `** hangs-up`, `** allows 4` | what a connection is told: to allow so many bytes above a frame |
| `** over halted` | the session is over: the reason of the first vCPU |
| `** garbage "why"` | a frame that must not come: its connection is closed |
"""

from typing import ClassVar
from unittest.mock import patch

import anyio
from playbook import Stage
from remote_parts import frame_of, trap

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import GuestMemoryError, WireError
from vmibridge.transport import session as session_module
from vmibridge.transport.handshake import hello
from vmibridge.transport.session import Session
from vmibridge.transport.wire import FRAME_LIMIT, Cancel, End, Memory, Ping, WireEnd
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import RegisterWrites

BEHIND = 0x1003
"""Where the guest of `remote_parts.trap` goes on."""


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def trap_frame(
    seq, vcpu=0, value=0, code=1, magic=STANDARD_MAGIC, left=5000, elsewhere=False, memory=None
):
    """`memory`: what comes along, from 0x5000 on."""
    pieces = () if memory is None else ((0x5000, memory.encode()),)
    return frame_of(trap(seq, vcpu, value, code, magic), left, elsewhere=elsewhere, memory=pieces)


def memory_frame(access, data="", error=None):
    return Memory(access, data.encode(), error)


def end_frame(reason="halted"):
    return End((WireEnd(0, reason),))


AGENT_FRAMES = {
    "trap": trap_frame,
    "memory": memory_frame,
    "ping": Ping,
    "cancel": Cancel,
    "end": end_frame,
    "hello": lambda vm="vm": hello(b"s" * 16, vm, other_hypercalls=False, architecture=X86),
}


class _Link:
    """A connection that keeps nothing."""

    def __init__(self, stage, who):
        self._stage, self._who = stage, who

    def post(self, frame, *, later=False):
        self._stage.frame_out(frame, self._who)

    def allow(self, size):
        self._stage.does("allows", size - FRAME_LIMIT, who=self._who)

    def close(self):
        self._stage.does("hangs-up", who=self._who)


class SessionStage(Stage):
    frames: ClassVar = AGENT_FRAMES
    usual: ClassVar = {"answer": {"rip": BEHIND}}

    def __init__(self, *, vcpus=4, repeated="refuse", connected=True):
        super().__init__()
        self.clock = Clock()
        self.session = Session(
            hello(b"s" * 16, "vm", other_hypercalls=False, architecture=X86),
            "peer",
            vcpus=vcpus,
            repeated=repeated,
            fallback=BridgeResponse(value1=0xBAD),
        )
        self.session.route = lambda _: self
        self._connected = connected
        self._links = {}
        self._events = {}
        self._accesses = {}

    async def __aenter__(self):
        self._patch = patch.object(session_module, "_clock", self.clock)
        self._patch.start()
        await super().__aenter__()
        self.tasks.start_soon(self._watch)
        if self._connected:
            await self.when_connects()
        return self

    async def __aexit__(self, *error):
        await super().__aexit__(*error)
        self._patch.stop()

    async def _watch(self):
        await self.session.over.wait()
        self.does("over", self.session.guest.vcpus[0].reason)

    def state(self):
        return {
            **self.session.counts.as_dict(),
            "open": self.session.open_traps,
            "away": self.session.link is None,
            "ended_by_itself": self.session.ended_by_itself,
        }

    async def send(self, frame, step):
        try:
            self.session.take(frame)
        except WireError as error:
            self.does("garbage", str(error))

    # --- as an engine -----------------------------------------------------------------

    def take(self, event):
        self._events[event.seq] = event
        self.does("takes", event.seq)

    def abandon(self, event):
        self.does("abandons", event.seq)

    # --- what happens -----------------------------------------------------------------

    async def when_connects(self, who=""):
        self._links[who] = _Link(self, who)
        self.session.attach(self._links[who])

    async def when_lost(self, who=""):
        self.session.detach(self._links[who])

    async def when_answers(self, seq, rax=None):
        self.session.answer(self._events[seq], RegisterWrites(BEHIND, rax))

    async def when_native(self, seq):
        self.session.answer(self._events[seq], None)

    async def when_gives_back(self, seq):
        self.session.give_back(self._events[seq])

    async def when_stops(self):
        self.session.route = lambda _: None

    async def when_passes(self, seconds):
        self.clock.now += float(seconds)
        self.session.give_up_overdue()

    async def when_forsaken(self, why):
        self.session.lose(str(why))

    async def when_reads(self, seq, address, size):
        async def read():
            self.does("has", await self.session.read(self._events[seq], address, size))

        self._begin(seq, read)

    async def when_writes(self, seq, address, data):
        async def write():
            await self.session.write(self._events[seq], address, data.encode())
            self.does("wrote")

        self._begin(seq, write)

    def _begin(self, seq, access):
        scope = self._accesses[seq] = anyio.CancelScope()

        async def run():
            with scope:
                try:
                    await access()
                except GuestMemoryError as error:
                    self.does("fails", str(error))

        self.tasks.start_soon(run)

    async def when_gives_up(self, seq):
        self._accesses[seq].cancel()


__all__ = ["AGENT_FRAMES", "BEHIND", "Clock", "SessionStage"]
