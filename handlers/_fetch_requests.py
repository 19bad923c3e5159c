"""Requests of the fetch handler: for URLs on its list, and for what these redirect to."""

import errno
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from urllib.parse import urljoin

import anyio

from vmibridge import __version__
from vmibridge.errors import ServerStateError
from vmibridge.handlers._fetch_addresses import Network, literal_address
from vmibridge.handlers._fetch_network import (
    CLOSE_TIMEOUT,
    CONNECT_TIMEOUT,
    CheckedBackend,
    FetchError,
    httpcore,
)
from vmibridge.handlers._fetch_urls import MAX_URL, Url, parse_url

__all__ = ["Client", "close", "content_length", "network_errors"]

_KEEP_ALIVE = 2.0
"""Seconds for which a connection waits for a next request: shorter than servers wait, so
that a request does not meet a connection that is just being closed."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Client:
    """A pool of connections, and what may be asked for over them."""

    def __init__(self, allow: Sequence[Url], private: Iterable[Network], redirects: int) -> None:
        self._allow = allow
        self._private = tuple(private)
        self._redirects = redirects
        self._pool: httpcore.AsyncConnectionPool | None = None

    def open(self, keep: int) -> None:
        """Make the pool; connections are made when a guest asks for them. `keep`: how many are
        kept for a next request, at most."""
        secure = any(url.scheme == "https" for url in self._allow)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context() if secure else None,
            # Each open handle holds one connection; an OPEN is never to wait for another's.
            max_connections=None,
            max_keepalive_connections=keep,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=CheckedBackend(
                httpcore.AnyIOBackend(),
                self._private,
                [literal for url in self._allow if (literal := literal_address(url.host))],
            ),
        )

    async def aclose(self) -> None:
        """Close all connections, also while being cancelled."""
        pool, self._pool = self._pool, None
        if pool is not None:
            with anyio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(*network_errors()):
                await pool.aclose()

    async def get(self, text: str) -> "httpcore.Response":
        """The response for a URL, or for what it redirects to, when its headers are there.

        Raises `FetchError`, and the network's errors; `ServerStateError` without a pool.
        """
        url = self._check(text)
        if self._pool is None:
            raise ServerStateError("the fetch handler answers between __aenter__ and __aexit__")
        left = self._redirects
        while True:
            response = await self._pool.handle_async_request(_get_request(url))
            location = _header(response, b"location")
            if response.status not in _REDIRECTS or location is None or not left:
                return response
            await close(response)
            left -= 1
            url = self._check(_resolve_location(url, location))

    def _check(self, text: str) -> Url:
        """Parse a URL and hold it against the list. Raises `FetchError`."""
        try:
            url = parse_url(text)
        except ValueError:
            raise FetchError(errno.EACCES) from None
        if not any(url.is_under(prefix) for prefix in self._allow):
            raise FetchError(errno.EACCES)
        return url


def _resolve_location(base: Url, location: bytes) -> str:
    """The URL that a redirect leads to, yet to be checked. Raises `FetchError`."""
    text = location.decode("latin-1")
    # Checked before it is joined as well: joining drops what it does not like.
    if len(text) > MAX_URL or not all("!" <= char <= "~" for char in text):
        raise FetchError(errno.EACCES)
    try:
        return urljoin(f"{base.scheme}://{base.authority}{base.target}", text)
    except ValueError:
        raise FetchError(errno.EACCES) from None


async def close(response: "httpcore.Response") -> None:
    """Give the connection back, or close it when the body was not read to its end."""
    with anyio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(*network_errors()):
        await response.aclose()


def network_errors() -> tuple[type[Exception], ...]:
    """What a fetch may meet on the network; httpcore's errors have no base of their own."""
    return (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.TimeoutException,
        OSError,
    )


def _get_request(url: Url) -> "httpcore.Request":
    """A GET of this URL, whose content comes as it is."""
    return httpcore.Request(
        "GET",
        httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target),
        headers={
            "Host": url.authority,
            "User-Agent": f"vmibridge/{__version__}",
            "Accept": "*/*",
            # The guest is to get the bytes as they are, and their number beforehand.
            "Accept-Encoding": "identity",
        },
        extensions={"timeout": {"connect": CONNECT_TIMEOUT}},
    )


def _header(response: "httpcore.Response", name: bytes) -> bytes | None:
    """The first header of this name, which is in lower case."""
    return next((value for key, value in response.headers if key.lower() == name), None)


def content_length(response: "httpcore.Response") -> int | None:
    """Bytes of the content; `None` where the server does not say."""
    if _header(response, b"transfer-encoding") is not None:
        return None
    value = _header(response, b"content-length")
    return int(value) if value is not None and value.isdigit() else None
