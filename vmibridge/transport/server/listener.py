"""Who may become a session: listens at all URLs, and does the handshake on sockets.

NATS has its own (`nats.listener`), for it has no connections of agents. What both check is in
`transport.handshake`.

- A peer has `handshake` seconds to say who it is, and to send no more than 64 KiB for it.
- At most `handshakes` peers are at that; the oldest has to go when there is one more. So a
  crowd that says nothing keeps no other peer out for long, and costs what that many sockets cost.
- Who a peer is, is what the kernel (unix) or its certificate (TLS) says, never the peer itself.
"""

import logging
import os
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from vmibridge.aio.listening import fail_after_listening
from vmibridge.aio.sockets import peer_user
from vmibridge.errors import ConnectionLostError, RefusedError, WireError
from vmibridge.health.state import Reason
from vmibridge.text import printable
from vmibridge.transport.handshake import check_hello, refused
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.session import Admit, Session
from vmibridge.transport.sockets.connection import Connection, keep_alive
from vmibridge.transport.sockets.endpoints import (
    ListeningSockets,
    listen,
)
from vmibridge.transport.sockets.tls import certified_names, tls_context
from vmibridge.transport.urls import SocketUrl, TlsUrl, UnixUrl, parse_url
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.transport.wire import (
    FRAME_LIMIT,
    FROM_AGENT,
    FromAgent,
    Hello,
    Trap,
)

if TYPE_CHECKING:
    from vmibridge.transport.nats.listener import NatsListener

log: logging.Logger = logging.getLogger(__name__)

AgentConnection: TypeAlias = Connection[FromAgent]

_LAST = 1.0
"""Seconds for sending a peer why it is refused."""
_MAX_IN_A_ROW = 64
"""Frames of one agent that are taken before other tasks have their turn."""


class Listener:
    """Listens at URLs, and serves the connections of the sessions that come of it."""

    def __init__(self, urls: Sequence[str], limits: AgentLimits, admit: Admit) -> None:
        """Raises `BackendSpecError` for a URL that is wrong."""
        found = [parse_url(url) for url in urls]
        self._urls: list[SocketUrl] = [url for url in found if not isinstance(url, NatsUrl)]
        self._nats = _on_nats([url for url in found if isinstance(url, NatsUrl)], limits, admit)
        self._limits = limits
        self._admit = admit
        self._contexts = {
            url: tls_context(url, server_side=True) for url in self._urls if isinstance(url, TlsUrl)
        }
        self._listening: list[ListeningSockets] = []
        self._at_handshake: dict[AgentConnection, None] = {}
        self._connections: set[AgentConnection] = set()
        self._refused = 0

    async def open(self) -> None:
        """Listen. Raises `BackendError` when a place cannot be had."""
        try:
            for url in self._urls:
                self._listening.append(await listen(url))
            for nats in self._nats:
                await nats.open()
        except BaseException:
            await self.end()
            raise

    @property
    def ports(self) -> list[int]:
        """The TCP ports, in the order of the URLs; 0 for unix sockets."""
        return [0 if isinstance(each.url, UnixUrl) else each.port for each in self._listening]

    @property
    def places(self) -> list[str]:
        """The URLs without their options, with the ports that were given."""
        return [str(each) for each in (*self._listening, *self._nats)]

    @property
    def refused(self) -> int:
        """Peers that did not become a session's; on NATS, messages of agents that were refused."""
        return self._refused + sum(nats.refused for nats in self._nats)

    def health(self) -> list[Reason]:
        """Why agents cannot reach it."""
        return [
            Reason("nats-unreachable", f"{nats}: the connection is lost")
            for nats in self._nats
            if not nats.is_up
        ]

    async def run(self) -> None:
        """Serve each agent that connects, until cancelled; then closes all connections."""
        try:
            async with anyio.create_task_group() as tasks:
                for each in self._listening:
                    tasks.start_soon(self._listen, each, tasks)
                for nats in self._nats:
                    tasks.start_soon(nats.run)
        finally:
            for connection in list(self._connections):
                connection.close()

    async def end(self) -> None:
        """Listen no more, and leave NATS."""
        self.close()
        for nats in self._nats:
            await nats.end()

    def close(self) -> None:
        """Listen no more. Connections that there are go on."""
        for each in self._listening:
            each.close()
        for nats in self._nats:
            nats.close()

    async def _listen(self, listening: ListeningSockets, tasks: TaskGroup) -> None:
        def take(accepted: socket.socket) -> None:
            connection: AgentConnection = Connection(accepted, FROM_AGENT)
            while len(self._at_handshake) >= self._limits.handshakes:
                next(iter(self._at_handshake)).close()
                self._at_handshake.pop(next(iter(self._at_handshake)))
                self._refused += 1
            self._at_handshake[connection] = None
            self._connections.add(connection)
            tasks.start_soon(self._run_connection, listening, accepted, connection)

        await listening.accept(take)

    async def _run_connection(
        self, listening: ListeningSockets, accepted: socket.socket, connection: AgentConnection
    ) -> None:
        session: Session | None = None
        try:
            session = await self._shake_hands(listening, accepted, connection)
            if session is not None:
                await self._take_frames(session, connection)
        except WireError as error:
            log.warning("%s: a peer broke the protocol: %s", listening.url, error)
            self._refused += session is None
        except ConnectionLostError as error:
            if session is None:
                self._refused += 1
                log.debug("%s: a peer did not get as far as HELLO: %s", listening.url, error)
            else:
                level = logging.DEBUG if session.over.is_set() else logging.INFO
                log.log(level, "vm %s: the connection is lost: %s", session.vm, error)
        finally:
            self._at_handshake.pop(connection, None)
            self._connections.discard(connection)
            connection.close()
            if session is not None:
                session.detach(connection)

    async def _shake_hands(
        self, listening: ListeningSockets, accepted: socket.socket, connection: AgentConnection
    ) -> Session | None:
        url = listening.url
        try:
            with fail_after_listening(self._limits.handshake):
                connection.peer = await self._identify(listening, accepted, connection)
                frames = await connection.receive()
                hello, *others = frames
                if not isinstance(hello, Hello) or others:
                    raise WireError("no HELLO, or something behind it")
                check_hello(hello)
                session, welcome = await self._admit(hello, connection.peer)
        except TimeoutError:
            self._refused += 1
            log.debug("%s: a peer sent no HELLO in time", url)
            return None
        except RefusedError as error:
            self._refused += 1
            log.warning("%s: refused: %s", url, printable(str(error)))
            connection.post(refused(error, final=error.final))
            await connection.drain(_LAST)
            return None
        # Nothing is awaited between WELCOME and the session's own frames.
        self._at_handshake.pop(connection, None)
        if connection.closed:
            return None
        connection.allow(FRAME_LIMIT)
        connection.post(welcome)
        session.attach(connection)
        return session

    async def _identify(
        self, listening: ListeningSockets, accepted: socket.socket, connection: AgentConnection
    ) -> str:
        url = listening.url
        if isinstance(url, UnixUrl):
            user = peer_user(accepted)
            if user not in (url.uids or (0, os.geteuid())):
                raise RefusedError(f"user {user} may not connect")
            return f"uid:{user}"
        if isinstance(url, TlsUrl):
            made = await connection.start_tls(self._contexts[url], None)
            return f"tls:{_client_name(made, url)}"
        return "tcp"

    async def _take_frames(self, session: Session, connection: AgentConnection) -> None:
        lost: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.write)
            tasks.start_soon(keep_alive, connection, None, self._limits.silence)
            try:
                while True:
                    for number, frame in enumerate(await connection.receive(), 1):
                        if type(frame) is Trap:
                            session.take_trap(frame)
                        else:
                            session.take(frame)
                        if not number % _MAX_IN_A_ROW:
                            await checkpoint()
                            if connection.closed:
                                # What else it sent is not to come behind its successor's.
                                raise ConnectionLostError("closed by the peer")
            except (ConnectionLostError, WireError) as error:
                # Raised in here, it would come out in a group.
                lost = error
            tasks.cancel_scope.cancel()
        assert lost is not None
        try:
            raise lost
        finally:
            # Else a circle with all of the connection, which only the garbage collector would end.
            del lost


def _on_nats(urls: list[NatsUrl], limits: AgentLimits, admit: Admit) -> "list[NatsListener]":
    if not urls:
        return []
    # Not at the top: those who use sockets would pay a tenth of the import for it.
    from vmibridge.transport.nats.listener import NatsListener

    return [NatsListener(url, limits, admit) for url in urls]


def _client_name(made: ssl.SSLObject, url: TlsUrl) -> str:
    """Who the peer is. A session is its owner's, so one without a name could be anybody's."""
    found = certified_names(made)
    if not found:
        raise RefusedError("the certificate has no name: it needs a subject alternative name")
    if not url.names:
        return ",".join(name for _, name in found)
    names = [name for kind, name in found if kind == "DNS"]
    for name in url.names:
        if name in names:
            return name
    raise RefusedError(f"no client of the DNS name {', '.join(names) or '(none)'} may connect")
