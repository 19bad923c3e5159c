"""From a URL to a server that has said WELCOME."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

import anyio

from vmibridge.errors import VmiBridgeError
from vmibridge.transport.sockets.connection import Connection, keep_alive
from vmibridge.transport.sockets.endpoints import connect, tls_context
from vmibridge.transport.urls import TlsUrl, Url
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.transport.wire import (
    FROM_SERVER,
    MEMORY_LIMIT,
    VERSION,
    WORD,
    Frame,
    FromServer,
    Hello,
    Ping,
    Refused,
    Welcome,
    WireError,
)
from vmibridge.vm.backend import Backend

_HANDSHAKE = 10.0
"""Seconds to a WELCOME; a server may have to load handlers first."""


class RefusedByServerError(VmiBridgeError):
    """The server does not want this agent."""

    def __init__(self, why: str, *, final: bool) -> None:
        super().__init__(why)
        self.final = final


class AgentLink(Protocol):
    """What an agent asks of its connection."""

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame; never waits, raises nothing."""

    def cork(self) -> None:
        """Keep what is posted until `uncork`."""

    def uncork(self) -> None:
        """Send what was posted since `cork`."""

    async def receive(self) -> list[FromServer]:
        """Wait for frames. Raises `ConnectionLostError` and `WireError`."""


class Dialled:
    """A connection to a server, after the handshake."""

    def __init__(
        self,
        link: AgentLink,
        welcome: Welcome,
        tasks: Callable[[float], list[Callable[[], Coroutine[Any, Any, None]]]],
        shares: dict[str, int] | None = None,
    ) -> None:
        self.link = link
        self.welcome = welcome
        self.tasks = tasks
        """What has to run beside it, given the seconds of silence that are too many."""
        self.shares: dict[str, int] = {} if shares is None else shares
        """Where several servers answer: how many traps each of them has answered."""


@asynccontextmanager
async def dial(url: Url, session: bytes, vm: str, backend: Backend) -> AsyncIterator[Dialled]:
    """Connect and shake hands.

    Raises `OSError`, `TimeoutError`, `ConnectionLostError`, `WireError`, and
    `RefusedByServerError`.
    """
    if isinstance(url, NatsUrl):
        # Only here: nats-py is an extra.
        from vmibridge.transport.nats.dial import dial_nats

        async with dial_nats(url, session, vm, backend) as dialled:
            yield dialled
        return
    context = tls_context(url, server_side=False) if isinstance(url, TlsUrl) else None
    with anyio.fail_after(_HANDSHAKE):
        connection: Connection[FromServer] = Connection(await connect(url), FROM_SERVER)
        try:
            if context is not None:
                assert isinstance(url, TlsUrl)
                await connection.start_tls(context, url.name)
            connection.post(Hello(WORD, VERSION, VERSION, session, vm, 0, backend.other_hypercalls))
            welcome, *others = await connection.receive()
            if isinstance(welcome, Refused):
                raise RefusedByServerError(welcome.why, final=welcome.final)
            if not isinstance(welcome, Welcome) or welcome.version != VERSION:
                raise WireError("no WELCOME")
            connection.reader.limit = MEMORY_LIMIT
            connection.give_back(others)
        except BaseException:
            connection.close()
            raise
    try:
        yield Dialled(
            connection,
            welcome,
            lambda silence: [
                connection.write,
                partial(keep_alive, connection, Ping(), silence),
            ],
        )
    finally:
        connection.close()
