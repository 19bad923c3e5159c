"""The stages of both ends on NATS, over a client that is no NATS: it keeps what is published.

`AgentLinkStage` is an agent's link. Servers have names, and speak from `srv.NAME`:

| step | is |
|---|---|
| `agent -> trap 1`, `agent <- answer 1 rax=7` | what the agent posts, and what it receives |
| `queue <- trap 1 at=1.1` | to the queue group; `at`: the trap and its attempt |
| `all <- ask 1 0` | to all servers |
| `web -> taken 1` | a server speaks of the last attempt; `at=1.1` of another one |
| `web <- cancel 1` | to one server |
| `!! nobody 1.1`, `!! nobody web`, `!! nobody hello` | no responders to what was published |
| `!! shakes-hands` | then `** welcome 5000`, or `** fails "why"` |
| `!! passes 1` | seconds go by, and the link looks after its traps |
| `!! passes 6 late=5` | the loop stood still for some of them |
| `!! nats-lost`, `!! nats-back`, `!! nats-closed`, `!! denied "why"` | the connection to NATS |

`NatsServerStage` is an `AgentServer` whose handler does what the playbook says. Agents have names,
which are those of their VMs, unless `!! agent second vm=web` says so:

| step | is |
|---|---|
| `web -> hello` | at the subject of all hellos |
| `web -> trap 1 at=1.1` | to the queue group, with its HELLO |
| `web -> ask 1 0` | at the inbox of its server; `at`: the reply subject |
| `web <- taken 1 at=1.1` | to an inbox; `at`: which subject of it |
| `!! finishes 1 rax=7` | the handler of a trap returns; `** begins 1`, `** cancelled 1` |
| `!! gone web`, `!! silent web` | whether an agent is there, when it is asked for |
| `!! missing web` | no responders to what the server has published to it |
| `!! passes 1`, `!! passes 6 late=5` | as above; the server looks for agents that are silent |
| `== here=1` | sessions that have an agent |
"""

from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import anyio
from nats_fakes import answer
from playbook import Stage
from remote_parts import REQUEST
from server_stage import PlayedServer
from session_stage import AGENT_FRAMES, BEHIND, Clock

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import VmiBridgeError
from vmibridge.transport.handshake import VERSION, hello
from vmibridge.transport.nats import agent_link, listener, server_link
from vmibridge.transport.nats.agent_link import NatsAgentLink
from vmibridge.transport.nats.message import (
    FROM_NATS_AGENT,
    FROM_NATS_SERVER,
    Ask,
    Messages,
    Taken,
    hello_in,
    pack,
)
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.transport.wire import (
    Ended,
    Hello,
    Native,
    Pong,
    Read,
    Refused,
    Returned,
    Trap,
    Welcome,
    Write,
)
from vmibridge.vm.arch.x86.description import X86

SILENCE = 6.0
NO_RESPONDERS = SimpleNamespace(data=b"", headers={"Status": "503"}, reply="")


def message(subject, data, reply=""):
    return SimpleNamespace(subject=subject, data=data, reply=reply, headers=None)


class FakeNatsClient:
    """As `NatsClient`; what is published goes to `published`, and what is asked to `requested`."""

    def __init__(self, url, published, requested=None):
        self.url = url
        self.closed = anyio.Event()
        self.denied = []
        self.at_work = False
        self.on_trouble = self.on_reconnect = lambda: None
        self.publish = published
        self.taking = {}
        """What takes the messages of each subject."""
        self.nats = SimpleNamespace(
            new_inbox=lambda: "inbox", max_payload=1 << 20, is_connected=True, request=requested
        )
        self.uptime = lambda: 0.0
        self.has_backlog = False

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.taking.clear()

    async def subscribe(self, subject, take, queue=""):
        self.taking[subject] = take

        async def end():
            self.taking.pop(subject, None)

        return end

    async def settle(self):
        """There is nothing to wait for."""


SERVER_FRAMES = {
    "welcome": lambda timeout=5000, version=VERSION: Welcome(
        version, b"m" * 16, 0, (STANDARD_MAGIC,), False, False, timeout, (None,) * 4, 64
    ),
    "refused": Refused,
    "taken": Taken,
    "answer": answer,
    "native": Native,
    "returned": Returned,
    "read": Read,
    "write": lambda access, seq, address, data: Write(access, seq, address, data.encode()),
    "pong": Pong,
    "ended": Ended,
}


class AgentLinkStage(Stage):
    frames: ClassVar = {**SERVER_FRAMES, **AGENT_FRAMES}
    usual: ClassVar = {"answer": {"rip": BEHIND}}

    def __init__(self, *, welcome=True, **url):
        """`welcome`: by a server `web`, before the playbook begins."""
        super().__init__()
        self.clock = Clock()
        self._welcome = welcome
        self.client = FakeNatsClient(
            NatsUrl(("nats:4222",), silence=SILENCE, **url), self._published
        )
        self.client.uptime = self.clock
        self._at = {}

    async def __aenter__(self):
        self._tick = anyio.Event()
        self._late = 0.0
        self._patches = [
            patch.object(agent_link, "_clock", self.clock),
            patch.object(agent_link, "sleep_late", self._sleep_late),
        ]
        for each in self._patches:
            each.start()
        await super().__aenter__()
        self.link = NatsAgentLink(
            self.client, hello(b"s" * 16, "vm", other_hypercalls=False, architecture=X86)
        )
        if self._welcome:
            await self.play("""
                !! shakes-hands
                queue <- hello ...
                web -> welcome at=hello
                ** welcome 5000
            """)
        return self

    async def __aexit__(self, *error):
        await super().__aexit__(*error)
        for each in self._patches:
            each.stop()

    async def _sleep_late(self, _):
        """As that of the link: until the playbook says that time passes."""
        await self._tick.wait()
        return self._late

    async def _receive(self):
        self.tasks.start_soon(self.link.watch)
        try:
            while True:
                for frame in await self.link.receive():
                    self.frame_out(frame, "agent")
        except VmiBridgeError as error:
            self.does("lost", str(error))

    def _published(self, subject, data, reply=""):
        place = reply.removeprefix("inbox.")
        if subject.startswith("srv."):
            who = subject.removeprefix("srv.")
        elif ".agent.all." in subject:
            who = "all"
        else:
            who = "queue"
        start, rest = hello_in(data)
        if isinstance(FROM_NATS_AGENT.decode(start[4:]), Hello) and rest:
            # Each trap brings it along.
            data = rest
        for frame in Messages(FROM_NATS_AGENT).frames(data):
            if isinstance(frame, Trap):
                self._at[frame.seq] = place
                # The registers are as the agent has posted them: only what the link decides.
                more = {"at": place, "registers": None, "reason": None, "ip": None}
                self.frame_out(frame, who, **more)
            else:
                self.frame_out(frame, who, at=place)

    def state(self):
        return {"shares": sum(self.link.shares.values()), "at_work": self.client.at_work}

    async def send(self, frame, step):
        if step.who == "agent":
            self.link.post(frame)
            return
        at = step.fields.get("at") or self._at[getattr(frame, "seq", None)]
        await self.link._take(message(f"inbox.{at}", pack(frame), f"srv.{step.who}"))

    async def when_shakes_hands(self):
        async def shake_hands():
            try:
                self.does("welcome", (await self.link.shake_hands()).timeout)
            except (VmiBridgeError, TimeoutError) as error:
                self.does("fails", str(error))
            else:
                await self._receive()

        self.tasks.start_soon(shake_hands)

    async def when_nobody(self, place):
        """`place`: below the inbox, or a server."""
        peer = next((each for each in self.link._peers if each.subject == f"srv.{place}"), None)
        at = place if peer is None else f"to.{peer.number}"
        await self.link._take(SimpleNamespace(**{**vars(NO_RESPONDERS), "subject": f"inbox.{at}"}))

    async def when_says_garbage(self, at):
        await self.link._take(message(f"inbox.{at}", b"\7\0\0\0", "srv.stranger"))

    async def when_passes(self, seconds, late=0):
        self.clock.now += float(seconds)
        self._late = float(late)
        tick, self._tick = self._tick, anyio.Event()
        tick.set()

    async def when_nats_lost(self):
        self.client.nats.is_connected = False
        self.client.uptime = lambda now=self.clock.now: now

    async def when_nats_back(self):
        self.client.nats.is_connected = True
        self.client.uptime = self.clock
        self.client.on_reconnect()

    async def when_nats_closed(self):
        self.client.closed.set()
        self.client.on_trouble()

    async def when_denied(self, why):
        self.client.denied.append(str(why))
        self.client.on_trouble()


class _FakeAgent:
    def __init__(self, vm, session):
        self.hello = pack(hello(session, vm, other_hypercalls=False, architecture=X86))
        self.vm = vm
        self.session = session
        self.home = ""
        """Where its server listens."""
        self.there = "yes"
        self.messages = Messages(FROM_NATS_SERVER)


class NatsServerStage(PlayedServer):
    frames: ClassVar = {
        **{name: made for name, made in AGENT_FRAMES.items() if name != "hello"},
        "ask": Ask,
        "hello": lambda: None,
    }

    def __init__(self, **options):
        super().__init__("nats://127.0.0.1:4222", **options)
        self._agents = {}

    def _client(self, url, _):
        self.client = FakeNatsClient(url, self._published, self._requested)
        return self.client

    async def __aenter__(self):
        await super().__aenter__()
        self._tick, self._late = anyio.Event(), 0.0
        self.clock = Clock()
        self._patches = [
            patch.object(listener, "_clock", self.clock),
            patch.object(server_link, "_clock", self.clock),
            patch.object(listener, "sleep_late", self._sleep_late),
        ]
        for each in self._patches:
            each.start()
        nats = self.server._listener._nats[0]
        nats._client = self._client(nats.url, "")
        await self.start()
        return self

    async def __aexit__(self, *error):
        await super().__aexit__(*error)
        for each in self._patches:
            each.stop()

    async def _sleep_late(self, _):
        await self._tick.wait()
        return self._late

    async def when_passes(self, seconds, late=0):
        self.clock.now += float(seconds)
        self._late = float(late)
        tick, self._tick = self._tick, anyio.Event()
        tick.set()

    def state(self):
        return {
            "vms": len(self.server.vms),
            "refused": self.server.refused,
            "here": sum(each.link is not None for each in self.server._sessions()),
        }

    def _agent(self, name):
        if name not in self._agents:
            session = name.encode().ljust(16, b"-")
            self._agents[name] = _FakeAgent(name, session)
        return self._agents[name]

    def _published(self, subject, data, reply=""):
        _, name, at = subject.split(".", 2)
        agent = self._agents[name]
        agent.home = reply or agent.home
        for frame in agent.messages.frames(data):
            self.frame_out(frame, name, at=at)

    async def _requested(self, subject, data, _):
        from nats.errors import NoRespondersError
        from nats.errors import TimeoutError as NatsTimeoutError

        _, name, at = subject.split(".", 2)
        agent = self._agents[name]
        for frame in Messages(FROM_NATS_SERVER).frames(data):
            self.frame_out(frame, name, at=at)
        if agent.there == "gone":
            raise NoRespondersError
        if agent.there == "silent":
            raise NatsTimeoutError

    async def send(self, frame, step):
        agent = self._agent(step.who)
        inbox = f"agents.{step.who}"
        at = step.fields.get("at")
        if step.name == "hello":
            await self._put(f"vmibridge.hello.{agent.vm}", agent.hello, f"{inbox}.hello")
        elif isinstance(frame, Trap):
            await self._put(
                f"vmibridge.{agent.vm}.{STANDARD_MAGIC:08x}.{REQUEST:04x}",
                agent.hello + pack(frame),
                f"{inbox}.{at or f'{frame.seq:x}.1'}",
            )
        else:
            await self._put(agent.home, pack(frame), f"{inbox}.{at or 'to.1'}")

    async def _put(self, subject, data, reply):
        """To whoever has subscribed."""
        mine = subject.split(".")
        for pattern, take in list(self.client.taking.items()):
            other = pattern.split(".")
            if len(mine) == len(other) and all(
                "*" in pair or pair[0] == pair[1] for pair in zip(other, mine, strict=True)
            ):
                await take(message(subject, data, reply))

    async def when_agent(self, name, vm):
        self._agents[name] = _FakeAgent(vm, name.encode().ljust(16, b"-"))

    async def when_gone(self, name):
        self._agent(name).there = "gone"

    async def when_silent(self, name):
        self._agent(name).there = "silent"

    async def when_missing(self, name):
        agent = self._agent(name)
        take = self.client.taking["inbox.*"]
        await take(SimpleNamespace(**{**vars(NO_RESPONDERS), "subject": agent.home}))

    async def when_asks_all(self, name, seq, vcpu):
        """One that does not know which server has its trap."""
        agent = self._agent(name)
        await self._put(
            f"vmibridge.{agent.vm}.agent.all.{agent.session.hex()}",
            pack(Ask(seq, vcpu)),
            f"agents.{name}.{seq:x}.1",
        )


__all__ = ["AgentLinkStage", "FakeNatsClient", "NatsServerStage"]
