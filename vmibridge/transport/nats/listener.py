"""The end of a server on NATS: it takes traps from the queue group, and answers their agents.

- Who may publish and subscribe is for NATS to say. The VM that an agent says it is has to be
  the one of the subject: so the rights for a subject are rights for one VM.
- Each trap brings the HELLO of its agent along. So any server can take it, and knows the VM
  from there on, as if it had connected.
- A trap is said to be TAKEN at once, and again each time that its agent asks.
- What is no message of an agent is dropped, without an answer.
"""

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio

from vmibridge.aio.listening import sleep_late
from vmibridge.errors import BackendError, NatsRefusedError, RefusedError, WireError
from vmibridge.text import printable
from vmibridge.transport.handshake import check_hello, refused
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.nats.client import NatsClient, is_no_responders
from vmibridge.transport.nats.login import reason
from vmibridge.transport.nats.message import (
    FROM_NATS_AGENT,
    Messages,
    hello_in,
    pack,
)
from vmibridge.transport.nats.server_link import NatsSessionLink
from vmibridge.transport.nats.subjects import (
    FROM_ALL_AGENTS,
    HELLO,
    QUEUE,
    may_be_answered,
    token_in,
    vm_token,
)
from vmibridge.transport.session import Admit
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.transport.wire import Hello, Pong

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log: logging.Logger = logging.getLogger(__name__)

_clock = time.monotonic

_PROBE = 1.0
"""Seconds for an agent to say that it is there."""
_MAX_REFUSED = 1024
_MAX_PAUSE = 5.0


class NatsListener:
    """A server in the queue group of one NATS.

    Raises nothing; `open` does.
    """

    def __init__(self, url: NatsUrl, limits: AgentLimits, admit: Admit) -> None:
        self.url = url
        self.refused: int = 0
        """Messages of agents that were not served."""
        self._limits = limits
        self._admit = admit
        self._name = f"vmibridge serve {socket.gethostname()} {os.getpid()}"
        self._client = NatsClient(url, self._name)
        self._inbox = ""
        self._by_hello: dict[bytes, NatsSessionLink] = {}
        self._by_incarnation: dict[str, NatsSessionLink] = {}
        self._by_session: dict[str, NatsSessionLink] = {}
        self._ends: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._admitting = anyio.Lock()
        self._closing = anyio.Event()
        self._logged: set[bytes] = set()
        self._opened = False

    def __str__(self) -> str:
        return str(self.url)

    @property
    def is_up(self) -> bool:
        """Whether traps of NATS come here."""
        return self._opened and self._client.is_up

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
            await client.settle()
            # By now NATS has said what it does not permit.
            why = next(iter(client.denied), "")
            client.at_work = True
        except Exception as error:
            why = str(reason(error))
        if why:
            await self.end()
            raise BackendError(f"{self.url}: {why}")

    async def run(self) -> None:
        """Look after the sessions, until cancelled; then what was said is sent."""
        try:
            while True:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._leave)
                    tasks.start_soon(self._watch)
                    await self._client.closed.wait()
                    tasks.cancel_scope.cancel()
                log.error("%s: NATS has closed the connection; trying again", self.url)
                await self._open_again()
        finally:
            await self._leave_group()
            await self.end()

    async def _open_again(self) -> None:
        """As a server of another inbox. Agents that ask for an answer find its session."""
        await self.end()
        for link in list(self._by_hello.values()):
            link.close()
            self._forget(link)
        pause, logged = 0.1, ""
        while True:
            await anyio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            self._client = NatsClient(self.url, self._name)
            try:
                await self.open()
            except BackendError as error:
                if str(error) != logged:
                    logged = str(error)
                    log.warning("%s; trying again", error)
                pause = min(2 * pause, _MAX_PAUSE)
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
        await self._leave_group()

    async def _leave_group(self) -> None:
        """What has come by now is taken, and given back where the server stops."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                while self._ends:
                    tasks.start_soon(self._ends.pop())

    async def _watch(self) -> None:
        """Agents that say nothing are away; sessions that are over are forgotten."""
        while True:
            # What came while the loop stood still is taken behind this.
            late = await sleep_late(min(1.0, self._limits.silence / 4))
            now = _clock()
            for link in list(self._by_hello.values()):
                link.heard += late
                session, quiet = link.session, now - link.heard
                if session.link is link and quiet >= self._limits.silence:
                    log.info("vm %s: nothing came from its agent for %g s", session.vm, quiet)
                    session.detach(link)
                if link.closed or (session.over.is_set() and quiet >= self._limits.handshake):
                    self._forget(link)

    def _forget(self, link: NatsSessionLink) -> None:
        self._by_hello.pop(link.hello, None)
        self._by_incarnation.pop(link.session.incarnation.hex(), None)
        self._by_session.pop(link.session.id.hex(), None)
        link.session.detach(link)

    # --- messages -------------------------------------------------------------------

    async def _take(self, message: "Msg") -> None:
        """At the subjects of the queue group: a HELLO, and the trap behind it."""
        link = None
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
            self.refused += link is None
            log.debug("%s: malformed message: %s", self.url, error)

    async def _take_own(self, message: "Msg") -> None:
        """At this server's own inbox: what an agent sends to the incarnation that it knows."""
        link = self._by_incarnation.get(message.subject.rpartition(".")[2])
        if link is None:
            return
        if is_no_responders(message):
            # The agent is gone. Or it has lost NATS, and comes back: then it is attached again.
            link.session.detach(link)
            return
        try:
            # A trap has its HELLO in front here, too; nothing else has.
            data = message.data
            data = data.removeprefix(link.hello)
            link.take(data, message.reply)
        except WireError as error:
            log.warning("%s: vm %s: malformed message: %s", self.url, link.session.vm, error)

    async def _take_from_all(self, message: "Msg") -> None:
        """What an agent asks all servers."""
        parts = message.subject.split(".")
        link = self._by_session.get(parts[-1])
        if link is None or parts[1] != vm_token(link.session.vm):
            return
        try:
            link.take(message.data, message.reply)
        except WireError as error:
            log.warning("%s: vm %s: malformed message: %s", self.url, link.session.vm, error)

    async def _find(self, start: bytes, message: "Msg", *, welcome: bool) -> NatsSessionLink | None:
        """The session of a HELLO, which may be new. Raises `WireError`."""
        hello = _decoded(start)
        if token_in(message.subject) != vm_token(hello.vm):
            raise WireError("at the subject of another VM")
        reply = message.reply if may_be_answered(message.reply) else ""
        # The probe waits. Without the lock a trap that comes right behind its HELLO would meanwhile
        # begin the same VM a second time.
        async with self._admitting:
            try:
                check_hello(hello)
                await self._probe(hello)
                session, welcome_frame = await self._admit(hello, "nats")
            except RefusedError as error:
                self.refused += 1
                if hello.session not in self._logged and len(self._logged) < _MAX_REFUSED:
                    self._logged.add(hello.session)
                    log.warning("%s: refused: %s", self.url, printable(str(error)))
                if reply:
                    self._client.publish(
                        reply, pack(refused(error, final=error.final)), self._inbox
                    )
                return None
            link = self._by_hello.get(start)
            if link is None or link.session is not session or link.closed:
                link = NatsSessionLink(self._client, self._inbox, session, start)
                self._by_hello[start] = link
                self._by_incarnation[session.incarnation.hex()] = link
                self._by_session[session.id.hex()] = link
                link.agent = _inbox_of(reply)
            link.heard = _clock()
            if session.link is not link:
                session.attach(link)
            if welcome:
                link.say(reply, welcome_frame)
            return link

    async def _probe(self, hello: Hello) -> None:
        """Whether the agent that was here before is there, when its VM is restarted."""
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
