"""Connections of the fetch handler: to addresses that were checked, and to no others.

A host's addresses are looked up here, and a connection goes to one of those that were checked: a
name that leads somewhere else by the time it is looked up again gets nowhere.
"""

import errno
import socket
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import anyio

from vmibridge.handlers._fetch_addresses import (
    Address,
    Network,
    is_public,
    literal_address,
    parse_address,
)

if TYPE_CHECKING:
    import httpcore
    from httpcore import AsyncNetworkBackend, AsyncNetworkStream
else:
    try:
        import httpcore
        from httpcore import AsyncNetworkBackend, AsyncNetworkStream
    except ImportError:
        # An optional dependency: the constructor of the handler says what is missing.
        httpcore, AsyncNetworkBackend, AsyncNetworkStream = None, object, object

__all__ = ["CLOSE_TIMEOUT", "CONNECT_TIMEOUT", "CheckedBackend", "FetchError", "httpcore"]

CONNECT_TIMEOUT = 30.0
"""Seconds for the look-up of a host and all attempts to reach it."""
CLOSE_TIMEOUT = 5.0
"""Seconds after which a connection that does not close is left to the system."""


class FetchError(Exception):
    """A request that ends in a failed status."""

    def __init__(self, native: int, code: int = 0) -> None:
        super().__init__(native, code)
        self.native = native
        self.code = code


class _Stream(AsyncNetworkStream):
    """A connection that is closed when its TLS handshake ends in any way but well."""

    def __init__(self, inner: "AsyncNetworkStream") -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> "AsyncNetworkStream":
        # httpcore closes it after an error, but not after a cancellation.
        try:
            return await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:  # a cancellation, too; closed here, and raised again
            with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._inner.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class CheckedBackend(AsyncNetworkBackend):
    """Connects to addresses that are allowed, and to those only.

    An address is allowed when it is public, in a network of `private`, or one of
    `literals` and itself the host that was asked for.
    """

    def __init__(
        self,
        inner: "AsyncNetworkBackend",
        private: Iterable[Network],
        literals: Iterable[Address],
    ) -> None:
        self._inner = inner
        self._private = tuple(private)
        self._literals = frozenset(literals)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: "Iterable[httpcore.SOCKET_OPTION] | None" = None,
    ) -> "AsyncNetworkStream":
        """A connection to the first address of a host that takes one.

        Raises `FetchError` when any of its addresses is not allowed: a name that
        leads to both sides of a firewall is not to be trusted at all.
        """
        limit = CONNECT_TIMEOUT if timeout is None else timeout
        with anyio.fail_after(limit) as scope:
            addresses = await self._resolve(host, port)
            for left in range(len(addresses), 0, -1):
                # An address that does not answer must leave time for the next one.
                share = (scope.deadline - anyio.current_time()) / left
                try:
                    return _Stream(
                        await self._inner.connect_tcp(
                            addresses[-left], port, share, local_address, socket_options
                        )
                    )
                except (httpcore.ConnectError, httpcore.ConnectTimeout):
                    if left == 1:
                        raise
        raise httpcore.ConnectError(f"{host} has no address")

    async def _resolve(self, host: str, port: int) -> list[str]:
        literal = literal_address(host)
        if literal is not None:
            if literal not in self._literals:
                self._check(literal)
            return [host]
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(place[4][0] for place in found))
        for address in addresses:
            self._check(parse_address(address))
        return addresses

    def _check(self, address: Address) -> None:
        if not is_public(address) and not any(address in network for network in self._private):
            raise FetchError(errno.EACCES)
