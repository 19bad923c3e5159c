"""The sockets of a URL: connected, listened at, and asked who is at the other end."""

import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.errors import BackendError, BackendSpecError
from vmibridge.transport.urls import SocketUrl, TlsUrl, UnixUrl

_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")


async def connect(url: SocketUrl) -> socket.socket:
    """Raises `OSError` when nobody listens there."""
    if isinstance(url, UnixUrl):
        return await sockets.connect(socket.AF_UNIX, str(url.path))
    return await sockets.connect_tcp(url.host, url.port)


class ListeningSockets:
    """The sockets of one URL that a server listens at."""

    def __init__(self, url: SocketUrl, made: list[socket.socket]) -> None:
        self.url = url
        self._sockets = made

    @property
    def port(self) -> int:
        """The port, where the URL said 0."""
        return int(self._sockets[0].getsockname()[1])

    def __str__(self) -> str:
        if isinstance(self.url, UnixUrl):
            return str(self.url)
        return str(msgspec.structs.replace(self.url, port=self.port))

    async def accept(self, take: Callable[[socket.socket], None]) -> None:
        """Give each connection to `take`, until cancelled."""
        async with anyio.create_task_group() as tasks:
            for each in self._sockets:
                tasks.start_soon(sockets.accept, each, take)

    def close(self) -> None:
        """Listen no more; the file of a unix socket is removed."""
        for each in self._sockets:
            if isinstance(self.url, UnixUrl) and each.fileno() >= 0:
                self.url.path.unlink(missing_ok=True)
            sockets.close(each)


async def listen(url: SocketUrl) -> ListeningSockets:
    """Raises `BackendError` when another one does, or the place cannot be had."""
    try:
        if isinstance(url, UnixUrl):
            return ListeningSockets(url, [await sockets.listen_unix(url.path, url.mode)])
        found = await anyio.getaddrinfo(
            url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise BackendError(f"{url}: {error.strerror or error}") from error
    except BackendError as error:
        raise BackendError(f"{url}: {error}") from error
    made: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            each = socket.socket(family, socket.SOCK_STREAM)
            made.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.setblocking(False)
            each.bind(address)
            each.listen(_BACKLOG)
    except OSError as error:
        for each in made:
            each.close()
        raise BackendError(f"{url}: {error.strerror or error}") from error
    return ListeningSockets(url, made)


def peer_user(connected: socket.socket) -> int:
    """The user at the other end of a unix socket (unix(7), SO_PEERCRED)."""
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(found)[1]
    return user


def tls_context(url: TlsUrl, *, server_side: bool) -> ssl.SSLContext:
    """Mutual TLS 1.3. Raises `BackendSpecError` for files that are none of what they should be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        # An agent that comes again shakes hands again.
        context.num_tickets = 0
    # Without a function OpenSSL asks the terminal for a pass phrase.
    no_phrase = str
    for file in (url.cert, url.key, url.ca):
        if not Path(file).is_file():
            raise BackendSpecError(f"{url}: {file}: there is no such file")
    try:
        context.load_cert_chain(url.cert, url.key, no_phrase)
    except (OSError, ValueError) as error:
        raise BackendSpecError(f"{url}: {url.cert}, {url.key}: {_reason(error)}") from error
    try:
        context.load_verify_locations(url.ca)
    except (OSError, ValueError) as error:
        raise BackendSpecError(f"{url}: {url.ca}: {_reason(error)}") from error
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


def certified_names(made: ssl.SSLObject) -> list[str]:
    """The names that the peer's certificate is for: of hosts, addresses, mail and URIs."""
    certificate = made.getpeercert() or {}
    found = certificate.get("subjectAltName", ())
    return [str(each[1]) for each in found]
