"""The end of a server on NATS: it takes traps from the queue group, and answers their agents.

- Who may publish and subscribe is for NATS to say. The VM that an agent says it is has to be
  the one of the subject: so the rights for a subject are rights for one VM.
- Each trap brings the HELLO of its agent along. So any server can take it, and knows the VM
  from there on, as if it had connected.
- A trap is said to be TAKEN at once, and again each time that its agent asks.
- What is no message of an agent is dropped, and nobody is answered.
"""

import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import anyio

from vmibridge.errors import BackendError
from vmibridge.text import printable
from vmibridge.transport.listener import RefusedError, check_hello
from vmibridge.transport.nats_client import NatsClient, NatsRefusedError, is_nobody
from vmibridge.transport.nats_message import (
    FROM_NATS_AGENT,
    Ask,
    Messages,
    NatsFromAgent,
    Taken,
    hello_in,
    pack,
)
from vmibridge.transport.nats_subjects import (
    FROM_ALL_AGENTS,
    HELLO,
    QUEUE,
    may_be_answered,
    token_in,
    vm_token,
)
from vmibridge.transport.nats_url import NatsUrl
from vmibridge.transport.session import Session
from vmibridge.transport.wire import (
    AgentLimits,
    Answer,
    Frame,
    Hello,
    Memory,
    Native,
    Pong,
    Read,
    Refused,
    Returned,
    Trap,
    Welcome,
    WireError,
    Write,
)

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = logging.getLogger(__name__)

_clock = time.monotonic

Admit: TypeAlias = Callable[[Hello, str], Awaitable[tuple[Session, Welcome]]]

_PROBE = 1.0
"""Seconds for an agent to say that it is there."""
_MOST_REFUSED = 1024
_LONGEST_PAUSE = 5.0


class _Open:
    """A trap that is not answered."""

    __slots__ = ("accesses", "asked", "reply", "vcpu")

    def __init__(self, vcpu: int, reply: str) -> None:
        self.vcpu = vcpu
        self.reply = reply
        """Where its answer goes."""
        self.accesses: dict[int, Read | Write] = {}
        """Guest memory that has been asked for."""
        self.asked: set[int] = set()
        """Those that were under way when the agent asked last."""


class NatsSessionLink:
    """The way to the agent of one session; a `Link`."""

    def __init__(self, client: NatsClient, inbox: str, session: Session, hello: bytes) -> None:
        self.session = session
        self.hello = hello
        self.inbox = f"{inbox}.{session.memory.hex()}"
        self.heard = _clock()
        self.closed = False
        self.agent = ""
        """The agent's own inbox."""
        self._client = client
        self._messages: Messages[NatsFromAgent] = Messages(FROM_NATS_AGENT)
        self._open: dict[int, _Open] = {}
        self._last: dict[int, int] = {}
        self._answers: dict[int, tuple[Answer | Native, str]] = {}
        self._reply = ""

    def allow(self, size: int) -> None:
        """Messages are bounded by what any frame may have."""

    def close(self) -> None:
        """No word goes out any more."""
        self.closed = True

    def say(self, reply: str, frame: Frame | Taken) -> None:
        """Publish for the agent."""
        if not self.closed and reply:
            self._client.publish(reply, pack(frame), self.inbox)

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame to where its trap came from."""
        seq = getattr(frame, "seq", None)
        if seq is None:
            self.say(self._reply, frame)
            return
        found = self._open.get(seq)
        if found is None:
            return
        if isinstance(frame, Read | Write):
            found.accesses[frame.access] = frame
        elif isinstance(frame, Answer | Native):
            del self._open[seq]
            self._answers[found.vcpu] = (frame, found.reply)
        elif isinstance(frame, Returned):
            del self._open[seq]
            del self._last[found.vcpu]
        self.say(found.reply, frame)

    def take(self, data: bytes, reply: str) -> None:
        """Take the frames of a message. Raises `WireError`."""
        self.heard = _clock()
        if self.session.link is not self and not self.closed:
            # The agent was thought to be away.
            self.session.attach(self)
        for frame in self._messages.frames(data):
            self._reply = reply
            try:
                self._take(frame, reply)
            finally:
                self._reply = ""

    def _take(self, frame: NatsFromAgent, reply: str) -> None:
        if isinstance(frame, Trap):
            self._take_trap(frame, reply)
        elif isinstance(frame, Ask):
            self._tell(frame)
        elif isinstance(frame, Memory):
            for found in self._open.values():
                if found.accesses.pop(frame.access, None) is not None:
                    found.asked.discard(frame.access)
                    break
            self.session.take(frame)
        else:
            self.session.take(frame)

    def _take_trap(self, frame: Trap, reply: str) -> None:
        last = self._last.get(frame.vcpu, 0)
        if frame.seq < last:
            return
        if frame.seq > last:
            self._open.pop(last, None)
        self._last[frame.vcpu] = frame.seq
        before = self._open.get(frame.seq)
        if before is not None:
            before.reply = reply
        else:
            self._open[frame.seq] = _Open(frame.vcpu, reply)
        try:
            self.session.take_trap(frame)
        except WireError as error:
            self._open.pop(frame.seq, None)
            del self._last[frame.vcpu]
            self.say(reply, Refused(str(error)[:1000], final=False))
            raise
        if frame.seq in self._open:
            self.say(reply, Taken(frame.seq))

    def _tell(self, ask: Ask) -> None:
        """That the trap is here, or its answer again."""
        found = self._open.get(ask.seq)
        if found is not None:
            self.say(found.reply, Taken(ask.seq))
            # A reply that has not come since the agent asked last may be lost.
            for number in found.asked & found.accesses.keys():
                self.say(found.reply, found.accesses[number])
            found.asked = set(found.accesses)
        else:
            answer, reply = self._answers.get(ask.vcpu, (None, ""))
            if answer is not None and answer.seq == ask.seq:
                self.say(reply, answer)


class NatsListening:
    """A server in the queue group of one NATS.

    Raises nothing; `open` does.
    """

    def __init__(self, url: NatsUrl, limits: AgentLimits, admit: Admit) -> None:
        self.url = url
        self.refused = 0
        """Agents that were not served."""
        self._limits = limits
        self._admit = admit
        self._name = f"vmibridge serve {socket.gethostname()} {os.getpid()}"
        self._client = NatsClient(url, self._name)
        self._inbox = ""
        self._by_hello: dict[bytes, NatsSessionLink] = {}
        self._by_memory: dict[str, NatsSessionLink] = {}
        self._by_session: dict[str, NatsSessionLink] = {}
        self._ends: list[Callable[[], Awaitable[None]]] = []
        self._admitting = anyio.Lock()
        self._closing = anyio.Event()
        self._told: set[bytes] = set()
        self._opened = False

    def __str__(self) -> str:
        return str(self.url)

    async def open(self) -> None:
        """Connect and subscribe. Raises `BackendError`."""
        client = self._client
        try:
            await client.__aenter__()
        except (OSError, NatsRefusedError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BackendError(f"{self.url}: {why}") from error
        self._opened = True
        self._inbox = client.nats.new_inbox()
        self._ends.clear()
        try:
            await client.subscribe(f"{self._inbox}.*", self._take_own)
            await client.subscribe(FROM_ALL_AGENTS, self._take_from_all)
            for subject in (*self.url.subjects, f"{HELLO}.*"):
                self._ends.append(await client.subscribe(subject, self._take, QUEUE))
            await client.nats.flush()
        except Exception as error:
            await self.end()
            raise BackendError(f"{self.url}: {type(error).__name__}") from error

    async def serve(self) -> None:
        """Look after the sessions, until cancelled; then what was said is sent."""
        try:
            while True:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._leave)
                    tasks.start_soon(self._watch)
                    await self._client.closed.wait()
                    tasks.cancel_scope.cancel()
                log.error("%s: NATS has shut us out; trying again", self.url)
                await self._open_again()
        finally:
            await self.end()

    async def _open_again(self) -> None:
        """As a server of another inbox. Agents that ask for an answer find its session."""
        await self.end()
        for link in list(self._by_hello.values()):
            link.close()
            self._forget(link)
        pause = 0.1
        while True:
            await anyio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            self._client = NatsClient(self.url, self._name)
            try:
                await self.open()
            except BackendError as error:
                log.debug("%s", error)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return

    async def end(self) -> None:
        """Leave NATS."""
        if self._opened:
            self._opened = False
            await self._client.__aexit__()

    def close(self) -> None:
        """Take no more traps; those that there are go on."""
        self._closing.set()

    async def _leave(self) -> None:
        await self._closing.wait()
        for end in self._ends:
            await end()

    async def _watch(self) -> None:
        """Agents that say nothing are away; sessions that are over are forgotten."""
        while True:
            await anyio.sleep(min(1.0, self._limits.silence / 4))
            now = _clock()
            for link in list(self._by_hello.values()):
                session, quiet = link.session, now - link.heard
                if session.link is link and quiet >= self._limits.silence:
                    log.info("vm %s: nothing came from its agent for %g s", session.vm, quiet)
                    session.detach(link)
                if link.closed or (session.over.is_set() and quiet >= self._limits.handshake):
                    self._forget(link)

    def _forget(self, link: NatsSessionLink) -> None:
        self._by_hello.pop(link.hello, None)
        self._by_memory.pop(link.session.memory.hex(), None)
        self._by_session.pop(link.session.id.hex(), None)
        link.session.detach(link)

    # --- messages -------------------------------------------------------------------

    async def _take(self, message: "Msg") -> None:
        """At the subjects of the queue group: a HELLO, and the trap behind it."""
        try:
            start, rest = hello_in(message.data)
            link = self._by_hello.get(start)
            if link is None or link.closed or not rest:
                link = await self._find(start, message, welcome=not rest)
                if link is None:
                    return
            elif token_in(message.subject) != vm_token(link.session.vm):
                raise WireError("at the subject of another VM")
            if rest and may_be_answered(message.reply):
                link.take(rest, message.reply)
        except WireError as error:
            log.debug("%s: garbage: %s", self.url, error)

    async def _take_own(self, message: "Msg") -> None:
        """At this server's own inbox: what an agent sends to the memory that it knows."""
        link = self._by_memory.get(message.subject.rpartition(".")[2])
        if link is None:
            return
        if is_nobody(message):
            # Nobody listens any more where the agent was. Or it has lost NATS, and comes back.
            link.session.detach(link)
            return
        try:
            data = message.data
            data = data.removeprefix(link.hello)
            link.take(data, message.reply)
        except WireError as error:
            log.warning("%s: vm %s: garbage: %s", self.url, link.session.vm, error)

    async def _take_from_all(self, message: "Msg") -> None:
        """What an agent asks all servers."""
        parts = message.subject.split(".")
        link = self._by_session.get(parts[-1])
        if link is None or parts[1] != vm_token(link.session.vm):
            return
        try:
            link.take(message.data, message.reply)
        except WireError as error:
            log.warning("%s: vm %s: garbage: %s", self.url, link.session.vm, error)

    async def _find(self, start: bytes, message: "Msg", *, welcome: bool) -> NatsSessionLink | None:
        """The session of a HELLO, which may be new. Raises `WireError`."""
        hello = _decoded(start)
        if token_in(message.subject) != vm_token(hello.vm):
            raise WireError("at the subject of another VM")
        reply = message.reply if may_be_answered(message.reply) else ""
        async with self._admitting:
            try:
                check_hello(hello)
                await self._probe(hello)
                session, told = await self._admit(hello, "nats")
            except RefusedError as error:
                self.refused += 1
                if hello.session not in self._told and len(self._told) < _MOST_REFUSED:
                    self._told.add(hello.session)
                    log.warning("%s: refused: %s", self.url, printable(str(error)))
                if reply:
                    self._client.publish(
                        reply, pack(Refused(str(error)[:1000], error.final)), self._inbox
                    )
                return None
            link = self._by_hello.get(start)
            if link is None or link.session is not session or link.closed:
                link = NatsSessionLink(self._client, self._inbox, session, start)
                self._by_hello[start] = link
                self._by_memory[session.memory.hex()] = link
                self._by_session[session.id.hex()] = link
                link.agent = _inbox_of(reply)
            link.heard = _clock()
            if session.link is not link:
                session.attach(link)
            if welcome:
                link.say(reply, told)
            return link

    async def _probe(self, hello: Hello) -> None:
        """Whether the agent that was here before is there, when its VM is begun anew."""
        from nats.errors import Error, NoRespondersError

        for link in list(self._by_hello.values()):
            session = link.session
            if session.vm != hello.vm or session.id == hello.session or not link.agent:
                continue
            try:
                await self._client.nats.request(f"{link.agent}.probe", pack(Pong()), _PROBE)
            except NoRespondersError:
                session.detach(link)
            except Error:
                continue


def _decoded(start: bytes) -> Hello:
    frames = Messages(FROM_NATS_AGENT).frames(start)
    if len(frames) != 1 or not isinstance(frames[0], Hello):
        raise WireError("no HELLO")
    return frames[0]


def _inbox_of(reply: str) -> str:
    """The inbox of an agent, of which it gave a subject below."""
    base, _, last = reply.rpartition(".")
    return base if last == "hello" else base.rpartition(".")[0]
