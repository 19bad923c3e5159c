"""Connections to a gdbstub, as sockets: a stream of anyio's costs as much as the rest of a trap."""

import errno
import os
import socket

import anyio


async def connect(where: str) -> socket.socket:
    """A connection to `unix:PATH` or `tcp:HOST:PORT`. Raises `OSError`."""
    kind, _, place = where.partition(":")
    if kind == "unix":
        return await _connect(socket.AF_UNIX, place)
    host, _, port = place.rpartition(":")
    found = await anyio.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    failed: OSError | None = None
    for family, _, _, _, address in found:
        try:
            connection = await _connect(family, address)
        except OSError as error:
            failed = error
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    raise failed or OSError(f"no address for {host}")


async def _connect(family: int, address: str | tuple[str | int, ...]) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(connection)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection
