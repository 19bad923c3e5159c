"""From a URL to a server that has said WELCOME: the one place of an agent that knows transports.

What it gives (`Dialled`) is the same for all of them. The transports do not know this module.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from vmibridge.aio.listening import fail_after_listening
from vmibridge.transport.handshake import WELCOME_SECONDS, check_welcome, hello
from vmibridge.transport.links import Dialled
from vmibridge.transport.sockets.connection import Connection, keep_alive
from vmibridge.transport.sockets.endpoints import connect
from vmibridge.transport.sockets.tls import tls_context
from vmibridge.transport.urls import TlsUrl, Url
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.transport.wire import (
    FROM_SERVER,
    MEMORY_LIMIT,
    FromServer,
    Ping,
)
from vmibridge.vm.backend import Backend


@asynccontextmanager
async def dial(url: Url, session: bytes, vm: str, backend: Backend) -> AsyncIterator[Dialled]:
    """Connect and shake hands.

    Raises `OSError`, `TimeoutError`, `ConnectionLostError`, `WireError`, and
    `RefusedByServerError`.
    """
    if isinstance(url, NatsUrl):
        # Not at the top: those who use sockets would pay a tenth of the import for it.
        from vmibridge.transport.nats.dial import dial_nats

        async with dial_nats(url, session, vm, backend) as dialled:
            yield dialled
        return
    context = tls_context(url, server_side=False) if isinstance(url, TlsUrl) else None
    with fail_after_listening(WELCOME_SECONDS):
        connection: Connection[FromServer] = Connection(await connect(url), FROM_SERVER)
        try:
            if context is not None:
                assert isinstance(url, TlsUrl)
                await connection.start_tls(context, url.name)
            connection.post(
                hello(
                    session,
                    vm,
                    other_hypercalls=backend.other_hypercalls,
                    architecture=backend.architecture,
                )
            )
            first, *others = await connection.receive()
            welcome = check_welcome(first, backend.architecture)
            connection.reader.limit = MEMORY_LIMIT
            connection.give_back(others)
        except BaseException:  # a cancellation in the handshake, too
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
