"""The client of nats-py, and what it leaves undone. Needs the extra `nats`."""

import asyncio
import time
from typing import TYPE_CHECKING
from urllib.parse import ParseResult

from nats.aio.client import DEFAULT_BUFFER_SIZE, Client
from nats.aio.transport import TcpTransport
from nats.errors import SecureConnRequiredError

from vmibridge.aio import sockets
from vmibridge.errors import NatsRefusedError

if TYPE_CHECKING:
    from nats.aio.client import Srv


class _Transport(TcpTransport):
    """One that leaves a name server behind: asyncio asks it in a thread that the end of the loop
    waits for, which is 20 seconds where the server is silent."""

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        assert uri.hostname is not None, "a URL of ours has a host"
        connecting = sockets.connect_tcp(uri.hostname, uri.port or 0)
        made = await asyncio.wait_for(connecting, connect_timeout)
        reader, writer = await asyncio.open_connection(sock=made, limit=buffer_size)
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = writer


class NatsPyClient(Client):
    """With `tls` it logs in over TLS or not at all.

    nats-py begins TLS only when the server's INFO asks for it, which comes in the clear: who is
    in between could leave that out, and would get the password.
    """

    def __init__(self, *, tls: bool) -> None:
        super().__init__()
        if tls and not hasattr(Client, "_connect_command"):
            raise NatsRefusedError("this nats-py cannot be held to TLS: install 2.16")
        self._has_to_be_tls = tls

    async def _connect_to_server(self, s: "Srv") -> None:
        if self._transport:
            # A connection that was refused would stay open until it is collected. `close`
            # has no types.
            self._transport.close()  # type: ignore[no-untyped-call]
        s.last_attempt = time.monotonic()
        self._transport = _Transport()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, DEFAULT_BUFFER_SIZE, self.options["connect_timeout"])

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            self._drop_transport()
        try:
            await super()._close(status, do_cbs)
        except (OSError, RuntimeError):
            # The last words did not go out (uvloop has a RuntimeError for that): nats-py stops
            # halfway then, and reports nothing.
            self._pending, self._pending_data_size = [], 0
            self._status = Client.DISCONNECTED
            self._drop_transport()
            await super()._close(status, do_cbs)

    def _drop_transport(self) -> None:
        """Close a connection that is lost, and do not wait for its end.

        The task that connects again may wait for that end. It is cancelled when the client is
        closed, its wait with it, and who waits for the same end after it gets a cancellation
        which is nobody's.
        """
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]
            self._transport = None

    def _connect_command(self) -> bytes:
        # Called after INFO and, if that asks for it, TLS; before anything is said.
        if self._has_to_be_tls and not self._server_info.get("tls_required"):
            raise SecureConnRequiredError
        return super()._connect_command()
