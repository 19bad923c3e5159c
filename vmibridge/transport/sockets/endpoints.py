"""The sockets of a URL: connected and listened at."""

import socket
from collections.abc import Callable

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.errors import BackendError
from vmibridge.files import reason
from vmibridge.transport.urls import SocketUrl, UnixUrl

_BACKLOG = 128


async def connect(url: SocketUrl) -> socket.socket:
    """Raises `OSError` when nothing listens there."""
    if isinstance(url, UnixUrl):
        return await sockets.connect(socket.AF_UNIX, str(url.path))
    return await sockets.connect_tcp(url.host, url.port)


class ListeningSockets:
    """The sockets of one URL that a server listens at."""

    def __init__(
        self, url: SocketUrl, made: list[socket.socket], file: sockets.UnixListener | None = None
    ) -> None:
        self.url = url
        self._sockets = made
        self._file = file

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
        if self._file is not None:
            self._file.close()
        for each in self._sockets:
            sockets.close(each)


async def listen(url: SocketUrl) -> ListeningSockets:
    """Raises `BackendError` when another one does, or the place cannot be had."""
    try:
        if isinstance(url, UnixUrl):
            file = await sockets.listen_unix(url.path, url.mode)
            return ListeningSockets(url, [file.socket], file)
        found = await sockets.addresses(url.host, url.port, flags=socket.AI_PASSIVE)
    except OSError as error:
        why = reason(error, url.path) if isinstance(url, UnixUrl) else error.strerror or error
        raise BackendError(f"{url}: {why}") from error
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
