"""Sockets that do not block: made, connected, listened at, and asked who is at the other end.

The same on every event loop: a socket of the standard library, and anyio to wait for it. So a
frame can be sent without waiting when there is room, which costs no task switch.
"""

import os
import socket
import ssl
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec

from vmibridge.errors import BackendError, BackendSpecError
from vmibridge.transport.urls import SocketUrl, TlsUrl, UnixUrl

_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")
_NO_FILES = 0.1
"""Seconds to wait when this process has too many open files to accept one more."""


async def connect(url: SocketUrl) -> socket.socket:
    """Raises `OSError` when nobody listens there."""
    if isinstance(url, UnixUrl):
        return await _connect(socket.AF_UNIX, str(url.path))
    found = await anyio.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    failed: OSError | None = None
    for family, _, _, _, address in found:
        try:
            return await _connect(family, address)
        except OSError as error:
            failed = error
    raise failed or OSError(f"{url.host} has no address")


async def _connect(family: int, address: object) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        _no_delay(made)
        try:
            made.connect(address)  # type: ignore[arg-type]
        except BlockingIOError:
            await anyio.wait_writable(made)
            code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except BaseException:
        made.close()
        raise
    return made


def _no_delay(made: socket.socket) -> None:
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Listening:
    """The sockets of one URL that a server listens at."""

    def __init__(self, url: SocketUrl, sockets: list[socket.socket]) -> None:
        self.url = url
        self._sockets = sockets

    @property
    def port(self) -> int:
        """The port, where the URL said 0."""
        return int(self._sockets[0].getsockname()[1])

    def __str__(self) -> str:
        if isinstance(self.url, UnixUrl):
            return str(self.url)
        return str(msgspec.structs.replace(self.url, port=self.port))

    async def serve(self, take: Callable[[socket.socket], None]) -> None:
        """Give each connection to `take`, until cancelled."""
        async with anyio.create_task_group() as tasks:
            for each in self._sockets:
                tasks.start_soon(_accept, each, take)

    def close(self) -> None:
        """Listen no more; the file of a unix socket is removed."""
        for each in self._sockets:
            if each.fileno() >= 0:
                anyio.notify_closing(each)
                each.close()
                if isinstance(self.url, UnixUrl):
                    self.url.path.unlink(missing_ok=True)


async def _accept(listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
    while listener.fileno() >= 0:
        try:
            await anyio.wait_readable(listener)
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            continue
        except anyio.ClosedResourceError:
            return
        except OSError:
            # No descriptor is left: those that are at the handshake free theirs soon.
            await anyio.sleep(_NO_FILES)
            continue
        accepted.setblocking(False)
        _no_delay(accepted)
        take(accepted)


async def listen(url: SocketUrl) -> Listening:
    """Raises `BackendError` when another one does, or the place cannot be had."""
    try:
        if isinstance(url, UnixUrl):
            return Listening(url, [await _listen_unix(url)])
        found = await anyio.getaddrinfo(
            url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise BackendError(f"{url}: {error.strerror or error}") from error
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
    return Listening(url, made)


async def _listen_unix(url: UnixUrl) -> socket.socket:
    await _remove_stale(url)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        # Nobody may connect between the two: so the file is made with no rights at all.
        before = os.umask(0o777)
        try:
            made.bind(str(url.path))
        finally:
            os.umask(before)
        made.listen(_BACKLOG)
        await anyio.Path(url.path).chmod(url.mode)
    except BaseException:
        made.close()
        raise
    return made


async def _remove_stale(url: UnixUrl) -> None:
    """A socket that a server left behind, which nobody listens at any more."""
    path = anyio.Path(url.path)
    try:
        mode = (await path.stat()).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BackendError(f"{url}: is there, and is no socket")
    try:
        found = await _connect(socket.AF_UNIX, str(url.path))
    except ConnectionRefusedError:
        await path.unlink(missing_ok=True)
        return
    except OSError as error:
        raise BackendError(f"{url}: {error.strerror}") from error
    found.close()
    raise BackendError(f"{url}: another server listens there")


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
