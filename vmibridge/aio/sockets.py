"""Sockets that do not block: made, listened at, received from and sent to.

The same on every event loop: a socket of the standard library, and anyio to wait for it. So
bytes can be sent without waiting when there is room, which costs no task switch; and the task
that receives may be cancelled in the very moment when bytes come. A unix stream of anyio's leaves
an `InvalidStateError` in asyncio's loop then.
"""

import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import anyio

from vmibridge.aio.own_thread import in_left_thread, in_own_thread
from vmibridge.errors import BackendError

Address: TypeAlias = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]
"""One of those that a name resolves to, as `socket.getaddrinfo` has it."""

_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")
_NO_FILES = 0.1
"""Seconds to wait when this process has too many open files to accept one more."""


async def connect(family: int, address: str | tuple[str | int | bytes, ...]) -> socket.socket:
    """A connection. Raises `OSError` when nothing listens there."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        _no_delay(made)
        code = made.connect_ex(address)
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(made)
            code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        made.close()
        raise
    return made


async def addresses(host: str, port: int, *, flags: int = 0) -> Sequence[Address]:
    """What `host` resolves to. Raises `OSError`. If cancelled, leaves its thread behind."""
    # As bytes a name is looked up as it is; as a string it has to be one that IDNA knows.
    name = host.encode() if host.isascii() else host

    def look_up() -> Sequence[Address]:
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags)

    return await in_left_thread(look_up)


async def connect_tcp(host: str, port: int) -> socket.socket:
    """The first address of `host` that answers. Raises `OSError` of the last one."""
    failed: OSError | None = None
    for family, _, _, _, address in await addresses(host, port):
        try:
            return await connect(family, address)
        except OSError as error:
            failed = error
    raise failed or OSError(f"{host} has no address")


async def listen_unix(path: Path, mode: int) -> "UnixListener":
    """Listen at a file of this mode; one that is left behind is removed.

    Raises `BackendError` if the address is in use, and for another file; `OSError`.
    """
    await _remove_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        # Nobody may connect between the two: so the file is made with no rights at all.
        before = os.umask(0o777)
        try:
            made.bind(str(path))
        finally:
            os.umask(before)
        made.listen(_BACKLOG)
        await in_own_thread(path.chmod, mode)
        return UnixListener(made, path)
    except BaseException:
        made.close()
        raise


class UnixListener:
    """A socket that listens at a file, which it removes at the end: its own, and not that of a
    server that has taken its place."""

    def __init__(self, made: socket.socket, path: Path) -> None:
        self.socket: socket.socket = made
        self._path = path
        self._identity = _identity(path)

    def close(self) -> None:
        """Listen no more, and remove the file. Once more does nothing."""
        if self.socket.fileno() < 0:
            return
        # Before the socket is closed, so that no other process takes the file for one left behind.
        if _identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)
        close(self.socket)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file. The number of an inode is not given to another file while a
    socket is bound to it."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _remove_stale(path: Path) -> None:
    """A socket that a process left behind, and at which nothing listens any more."""
    try:
        mode = (await in_own_thread(path.stat)).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BackendError("exists, and is not a socket")
    try:
        found = await connect(socket.AF_UNIX, str(path))
    except ConnectionRefusedError:
        await in_own_thread(path.unlink, True)
        return
    except BlockingIOError:  # of a process that is stopped, whose backlog is full
        pass
    else:
        found.close()
    raise BackendError("address already in use")


def has_hung_up(connected: socket.socket) -> bool:
    """Whether the other end is closed, or gone, though there may be something to receive yet."""
    if connected.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(connected, select.POLLRDHUP)
    return bool(poll.poll(0))


async def accept(listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
    """Give each connection to `take`, until cancelled or `close` closes the listener."""
    while (accepted := await accept_one(listener)) is not None:
        take(accepted)


async def accept_one(listener: socket.socket) -> socket.socket | None:
    """The next connection; `None` when `close` closes the listener, or has done so."""
    while listener.fileno() >= 0:
        try:
            await anyio.wait_readable(listener)
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            continue
        except anyio.ClosedResourceError:
            return None
        except OSError:
            # No descriptor is left: those that are at the handshake free theirs soon.
            await anyio.sleep(_NO_FILES)
            continue
        accepted.setblocking(False)
        _no_delay(accepted)
        return accepted
    return None


def peer_user(connected: socket.socket) -> int:
    """The user at the other end of a unix socket (unix(7), SO_PEERCRED)."""
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(found)[1]
    return user


def close(open_one: socket.socket) -> None:
    """Close it; tasks that wait for it get `anyio.ClosedResourceError`. Once more does nothing."""
    if open_one.fileno() >= 0:
        anyio.notify_closing(open_one)
        open_one.close()


async def receive(connected: socket.socket, size: int) -> bytes:
    """What comes, at most `size` bytes. Raises `anyio.EndOfStream` at the end, and `OSError`.

    `anyio.ClosedResourceError`, when `close` closes it, or has done so. If cancelled, nothing was
    received.
    """
    data, _ = await receive_fds(connected, size, 0)
    return data


async def receive_fds(connected: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """The same of a unix socket, with at most `most` file descriptors that come along."""
    while True:
        if connected.fileno() < 0:
            # Closed before this: loops raise `ValueError` for it, which is what bad bytes raise.
            raise anyio.ClosedResourceError
        await anyio.wait_readable(connected)
        try:
            data, passed, _, _ = socket.recv_fds(connected, size, most)
        except BlockingIOError:
            continue
        if not data:
            raise anyio.EndOfStream
        return data, passed


async def send(connected: socket.socket, data: bytes) -> None:
    """Send all of it. Raises `OSError`. Cancelled, a part may have been sent."""
    left = memoryview(data)
    while left:
        try:
            left = left[connected.send(left) :]
        except BlockingIOError:
            await anyio.wait_writable(connected)


def _no_delay(made: socket.socket) -> None:
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
