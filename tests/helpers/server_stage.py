"""The stage of an `AgentServer` on a unix socket: an agent's connections, and a handler that does
what the playbook says.

| step | is |
|---|---|
| `!! connects`, `!! connects again` | a connection, which says nothing yet |
| `-> hello session=other vm=vm` | and any frame of an agent; `again -> hello` on that connection |
| `!! hangs-up`, `** hung-up` | the agent closes its connection; the server does |
| `** begins 1`, `!! finishes 1 7`, `** cancelled 1` | the handler of trap 1, of method 1 |
| `** inverts 5` | that of method 2, which answers at once |
| `-> trap 1 value=0x5000 code=3` | answers 4 bytes that it reads; method 4 writes them first |
| `** ended vm 3 lost "why"` | a VM has ended, after so many traps: how its first vCPU did |
| `!! noticed` | the server has seen the end of each connection that an agent closed |
| `!! stops` | the server, in good order |

Behind each step the stage asks each welcome connection by PING whether all has come that the
server had sent; what a handler does later is waited for when a step is about it.
"""

from contextlib import asynccontextmanager
from typing import ClassVar

import anyio
from playbook import Stage
from remote_parts import REQUEST, FakeAgent
from session_stage import AGENT_FRAMES, BEHIND
from waiting import until

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConnectionLostError
from vmibridge.transport import AgentServer
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.wire import MEMORY_LIMIT, Hello, Ping, Pong, Welcome

MASK = (1 << 64) - 1


class PlayedHandler(BridgeHandler[None]):
    """Tells the stage of each call, and returns when the playbook says so."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST

    def __init__(self, stage):
        self._stage = stage

    @method(1)
    async def hold(self, vmi, packet):
        seq = vmi.event.seq
        done = self._stage.waiting[seq] = anyio.Event()
        self._stage.does("begins", seq, loose=True)
        try:
            await done.wait()
        except BaseException:  # noted for the script, and raised again
            self._stage.does("cancelled", seq, loose=True)
            raise
        return BridgeResponse(value1=self._stage.done[seq])

    @method(2)
    async def invert(self, vmi, packet):
        self._stage.does("inverts", packet.value1, loose=True)
        return BridgeResponse(value1=~packet.value1 & MASK)

    @method(3)
    async def read(self, vmi, packet):
        data = await vmi.memory.read_physical(packet.value1, 4)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(4)
    async def write(self, vmi, packet):
        await vmi.memory.write_physical(packet.value1, b"abcd")
        return await self.read(vmi, packet)


class PlayedServer(Stage):
    """A stage whose machine is an `AgentServer` with this handler, for whatever transport."""

    usual: ClassVar = {"answer": {"rip": BEHIND}}

    def __init__(self, url, settings=None, **options):
        super().__init__()
        self.waiting, self.done = {}, {}
        self.server = AgentServer(
            [url],
            lambda _: Bridge(PlayedHandler(self)),
            settings=settings
            or ServerSettings(timeout=3600, fallback=BridgeResponse(value1=0xBAD)),
            **options,
        )

    async def start(self):
        self.tasks.start_soon(self.server.run)
        await self.server.listening.wait()

    async def when_finishes(self, seq, rax):
        self.done[seq] = rax
        self.waiting[seq].set()

    async def when_stops(self):
        self.server.stop()


def hello_frame(session="s", vm="vm", version=VERSION):
    return Hello(WORD, version, VERSION, session.encode().ljust(16, b"-"), vm)


class _Connected:
    def __init__(self, agent):
        self.agent = agent
        self.welcome = False
        self.pongs = 0
        """Replies to the stage's own PING that are still to come."""


class ServerStage(PlayedServer):
    frames: ClassVar = {**AGENT_FRAMES, "hello": hello_frame}

    def __init__(self, url, **options):
        super().__init__(url, on_end=self._on_end, **options)
        self._url = url
        self._connections = {}
        self._incarnations = set()
        self._changed = anyio.Event()

    async def __aenter__(self):
        await super().__aenter__()
        await self.start()
        return self

    async def __aexit__(self, *error):
        self.server.stop(now=True)
        await super().__aexit__(*error)

    async def _on_end(self, vm, summary, counts):
        how = summary.guest and summary.guest.vcpus and summary.guest.vcpus[0]
        said = (how.reason, how.detail) if how else ()
        self.does("ended", vm, summary.total, *said, loose=True)

    def state(self):
        return {
            "vms": len(self.server.vms),
            "refused": self.server.refused,
            "incarnations": len(self._incarnations),
        }

    def _tell(self):
        self._changed.set()
        self._changed = anyio.Event()

    def does(self, name, *values, **how):
        super().does(name, *values, **how)
        self._tell()

    async def _read(self, who, connected):
        connection = connected.agent.connection
        try:
            while True:
                for frame in await connection.receive():
                    if isinstance(frame, Welcome):
                        connection.reader.limit = MEMORY_LIMIT
                        connected.welcome = True
                        self._incarnations.add(frame.incarnation)
                    if isinstance(frame, Pong) and connected.pongs:
                        connected.pongs -= 1
                    else:
                        self.frame_out(frame, who)
                self._tell()
        except ConnectionLostError:
            del self._connections[who]
            if not connection.closed:
                self.does("hung-up", who=who, loose=True)
            self._tell()

    async def settle(self):
        await super().settle()
        for who, connected in list(self._connections.items()):
            if connected.welcome:
                connected.pongs += 1
                connected.agent.post(Ping())
                await self._until(
                    lambda each=connected, who=who: (
                        not each.pongs or self._connections.get(who) is not each
                    )
                )

    async def something_comes(self):
        await self._until(lambda: self._came)

    async def _until(self, true):
        with anyio.move_on_after(10):
            while not true():
                await self._changed.wait()

    async def send(self, frame, step):
        self._connections[step.who].agent.post(frame)

    async def when_connects(self, who=""):
        async def run(task_status):
            async with FakeAgent.connected(self._url) as agent:
                connected = self._connections[who] = _Connected(agent)
                task_status.started()
                await self._read(who, connected)

        await self.tasks.start(lambda *, task_status: run(task_status))

    async def when_hangs_up(self, who=""):
        connected = self._connections[who]
        connected.agent.connection.close()
        await self._until(lambda: self._connections.get(who) is not connected)

    async def when_noticed(self):
        def all_away():
            linked = sum(vm.session.link is not None for vm in self.server._vms.values())
            return linked == sum(each.welcome for each in self._connections.values())

        await until(all_away)


@asynccontextmanager
async def welcome(url, **options):
    """A stage whose agent is connected, and welcome."""
    async with ServerStage(url, **options) as stage:
        await stage.play("""
            !! connects
            -> hello
            <- welcome ...
        """)
        yield stage
