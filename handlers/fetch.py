"""Let the guest download what the host allows: GET over HTTP and HTTPS, in pieces.

    [handlers.fetch]
    allow = ["https://example.com/tools", "http://192.168.0.2:8000"]

| method | value1 in | value2 in | value3 in | value2 out |
|---|---|---|---|---|
| 0x0001 OPEN | address of a URL: at most 2048 bytes, then a NUL | | | handle, 1 to 4095 |
| 0x0002 READ | handle | address of a buffer | its capacity in bytes | bytes written, 0: the end |
| 0x0003 CLOSE | handle | | | 0 |
| 0x0004 LENGTH | handle | | | length of the content in bytes, 2**64-1: not known |

value1 of the answer is the status. A capacity is at most 64 KiB; 0 stands for 4096. READ
waits for the next piece only, and may fill less than the buffer.

| status | native | when |
|---|---|---|
| invalid parameters | | a URL or a buffer that is not accessible, a capacity over 64 KiB |
| | | a handle that is not open, or that another address space opened |
| failed | EACCES | the URL, a redirect or an address that it leads to is not allowed |
| failed | EMFILE | as many handles are open as may be |
| failed, code 1 | the HTTP status | the server answered other than 200 |
| failed | EIO | the network failed, or the body ended too early |
| failed | EFBIG | the content is longer than may be |
| failed | EBUSY | another vCPU reads from this handle right now |

The native code is in the upper half of the status, which an x86 guest does not see.

Invariants:

- Only URLs on the list are asked for. Each redirect is held against it like the first URL.
- A host's addresses are looked up and checked here, all of them, and a connection goes to
  an address that was checked. So a name that changes its address gets nowhere.
- A READ that fails, or that its deadline cuts off, ends the transfer and frees its handle;
  with invalid parameters nothing is lost, and it can be repeated.
- A handle that was not used for a while is taken back when the next one is opened.
"""

import errno
import ssl
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from ipaddress import ip_network
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import anyio
import msgspec

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    Status,
    StatusKind,
    method,
)
from vmibridge.errors import MissingExtraError, ServerStateError
from vmibridge.handlers._fetch_network import (
    CLOSE_TIMEOUT,
    CheckedBackend,
    FetchError,
    close,
    content_length,
    get_request,
    header,
    httpcore,
    literal_address,
    network_errors,
)
from vmibridge.handlers._fetch_urls import Url, parse_prefix, parse_url

MAX_URL = 2048
"""Bytes of a URL, without its NUL."""
MAX_HANDLE = 4095
MAX_CAPACITY = 64 << 10
"""Bytes that one READ may ask for."""
DEFAULT_CAPACITY = 4096
"""Bytes of a buffer whose capacity is given as 0, as by every x86 VMCALL."""
UNKNOWN_LENGTH = (1 << 64) - 1

_KEEP_ALIVE = 2.0
"""Seconds for which a connection waits for a next request: shorter than servers wait, so
that a request does not meet a connection that is just being closed."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class _Transfer:
    """One response on its way into the guest."""

    __slots__ = (
        "_chunks",
        "_ended",
        "_left",
        "_rest",
        "busy",
        "length",
        "owner",
        "response",
        "used",
    )

    def __init__(
        self, response: "httpcore.Response", length: int | None, limit: int, owner: int
    ) -> None:
        self.response = response
        self.length = length
        """Bytes of the content; `None` where the server did not say."""
        self.owner = owner
        """The address space that opened it."""
        self.busy = False
        """A READ is under way."""
        self.used = anyio.current_time()
        """When it was last used, in seconds of the loop's clock."""
        self._left = limit
        self._rest = memoryview(b"")
        self._ended = False
        self._chunks: AsyncIterator[bytes] | None = None

    async def peek(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end. `skip` takes them.

        Waits for the network only when nothing is left of the last piece. Raises
        `FetchError` when the content is longer than allowed, and the network's errors;
        the transfer is then to be closed, as it is after a cancellation.
        """
        if self._chunks is None:
            assert isinstance(self.response.stream, AsyncIterable)
            self._chunks = aiter(self.response.stream)
        while not self._rest and not self._ended:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                self._ended = True
                await close(self.response)
                break
            self._left -= len(chunk)
            if self._left < 0:
                raise FetchError(errno.EFBIG)
            self._rest = memoryview(chunk)
        return bytes(self._rest[:size])

    def skip(self, size: int) -> None:
        """Take bytes that `peek` gave."""
        self._rest = self._rest[size:]

    async def aclose(self) -> None:
        """Close the connection, unless the end was reached. Never raises, never hangs."""
        await close(self.response)
        if self._chunks is None or self.busy:
            # Nothing to end, or a READ that ends with an error now.
            return
        # The body is a chain of generators that are held in the middle: with their
        # connection closed they end by themselves, at the latest by an error, while a
        # generator that is dropped would be left to the garbage collector.
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(*network_errors()):
            async for _ in self._chunks:
                pass


class Fetch(BridgeHandler[int]):
    """Streams allowed URLs into the guest. The output of READ is the bytes written.

    Uses no proxy, sends no credentials, and trusts the certificates that the system
    trusts (`SSL_CERT_FILE` adds others). Raises `MissingExtraError` without httpcore.
    """

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0023
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4
    may_wait = True
    wait = BridgeResponse(Status(kind=StatusKind.WAITING).encode())

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """What may be fetched. Raises `ValueError` if a value is out of range."""

        allow: list[str] = msgspec.field(default_factory=list)
        """URL prefixes: scheme, host, port if it is not the scheme's own, and a path that
        stands for itself and what is below it, compared as written, with any query. With
        no prefix nothing is allowed."""
        private: list[str] = msgspec.field(default_factory=list)
        """Networks (`10.0.0.0/8`) that hosts of the list may be in; otherwise they have to
        be on the public Internet. A host given as an address needs no mention here."""
        redirects: int = 5
        """Redirects that are followed; of one more the guest gets the HTTP status."""
        max_bytes: int = 64 << 20
        """Bytes of the content of one fetch, at most."""
        max_open: int = 16
        """Handles that may be open at a time, in all address spaces of a VM."""
        idle_timeout: float = 60.0
        """Seconds after which an unused handle is taken back when another is opened."""

        def __post_init__(self) -> None:
            for entry in self.allow:
                try:
                    parse_prefix(entry)
                except ValueError as error:
                    raise ValueError(f"allow: {entry!r}: {error}") from error
            for entry in self.private:
                try:
                    ip_network(entry)
                except ValueError as error:
                    raise ValueError(f"private: {error}") from error
            if self.redirects < 0:
                raise ValueError(f"redirects is 0 or more, got {self.redirects!r}")
            if self.max_bytes < 1:
                raise ValueError(f"max_bytes is 1 or more, got {self.max_bytes!r}")
            if not 1 <= self.max_open <= MAX_HANDLE:
                raise ValueError(f"max_open is 1 to {MAX_HANDLE}, got {self.max_open!r}")
            if not self.idle_timeout > 0:
                raise ValueError(
                    f"idle_timeout is a positive number of seconds, got {self.idle_timeout!r}"
                )

    def __init__(self, settings: Settings | None = None) -> None:
        if httpcore is None:
            raise MissingExtraError("the fetch handler", "fetch")
        self._settings = settings or self.Settings()
        self._allow = [parse_prefix(entry) for entry in self._settings.allow]
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._transfers: dict[int, _Transfer] = {}
        self._opening = 0
        self._last_handle = 0
        self._network_errors = network_errors()

    async def __aenter__(self) -> Self:
        """Make the pool; connections are made when a guest asks for them."""
        secure = any(url.scheme == "https" for url in self._allow)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context() if secure else None,
            # Each open handle holds one connection; an OPEN is never to wait for another's.
            max_connections=None,
            max_keepalive_connections=self._settings.max_open,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=CheckedBackend(
                httpcore.AnyIOBackend(),
                [ip_network(entry) for entry in self._settings.private],
                [literal for url in self._allow if (literal := literal_address(url.host))],
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all transfers and connections, also while being cancelled."""
        while self._transfers:
            _, transfer = self._transfers.popitem()
            await transfer.aclose()
        pool, self._pool = self._pool, None
        if pool is not None:
            with anyio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(*self._network_errors):
                await pool.aclose()

    @method(0x0001)
    async def open(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """Ask for a URL; answer when the headers are there."""
        try:
            # Latin-1 takes any byte; what is not ASCII is refused with the URL.
            url = (await vmi.memory.read_c_string(packet.value1, MAX_URL)).decode("latin-1")
        except GuestMemoryError:
            return _invalid(packet)
        await self._reclaim()
        if len(self._transfers) + self._opening >= self._settings.max_open:
            return _failed(packet, errno.EMFILE)
        self._opening += 1
        try:
            transfer = await self._start(url, vmi.event.address_space)
        except FetchError as error:
            return _failed(packet, error.native, error.code)
        except self._network_errors:
            return _failed(packet, errno.EIO)
        finally:
            self._opening -= 1
        handle = self._next_handle()
        self._transfers[handle] = transfer
        return _success(packet, handle)

    @method(0x0002)
    async def read(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """Write the next piece of the content into a buffer of the guest."""
        transfer = self._find(vmi, packet)
        capacity = packet.value3 or DEFAULT_CAPACITY
        if transfer is None or capacity > MAX_CAPACITY:
            return _invalid(packet)
        if transfer.busy:
            return _failed(packet, errno.EBUSY)
        transfer.busy = True
        intact = False
        try:
            try:
                data = await transfer.peek(capacity)
            except FetchError as error:
                return _failed(packet, error.native, error.code)
            except self._network_errors:
                return _failed(packet, errno.EIO)
            try:
                await vmi.memory.write(packet.value2, data)
            except GuestMemoryError:
                intact = True
                return _invalid(packet)
            transfer.skip(len(data))
            intact = True
            return _success(packet, len(data)).with_output(len(data))
        finally:
            transfer.busy = False
            transfer.used = anyio.current_time()
            if not intact:
                if self._transfers.get(packet.value1) is transfer:
                    del self._transfers[packet.value1]
                await transfer.aclose()

    @method(0x0003)
    async def close(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """End a transfer and free its handle."""
        transfer = self._find(vmi, packet)
        if transfer is None:
            return _invalid(packet)
        if transfer.busy:
            return _failed(packet, errno.EBUSY)
        del self._transfers[packet.value1]
        await transfer.aclose()
        return _success(packet, 0)

    @method(0x0004)
    async def length(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """Tell the length of the content; an x86 guest gets the low 32 bits."""
        transfer = self._find(vmi, packet)
        if transfer is None:
            return _invalid(packet)
        return _success(packet, UNKNOWN_LENGTH if transfer.length is None else transfer.length)

    def _find(self, vmi: BridgeContext, packet: BridgePacket) -> _Transfer | None:
        transfer = self._transfers.get(packet.value1)
        if transfer is None or transfer.owner != vmi.event.address_space:
            return None
        return transfer

    def _next_handle(self) -> int:
        # In turn, so that a handle that was closed is not soon another transfer's.
        handle = self._last_handle
        while True:
            handle = handle % MAX_HANDLE + 1
            if handle not in self._transfers:
                self._last_handle = handle
                return handle

    async def _reclaim(self) -> None:
        oldest = anyio.current_time() - self._settings.idle_timeout
        idle = [
            handle
            for handle, transfer in self._transfers.items()
            if not transfer.busy and transfer.used < oldest
        ]
        for transfer in [self._transfers.pop(handle) for handle in idle]:
            await transfer.aclose()

    async def _start(self, text: str, owner: int) -> _Transfer:
        """Request a URL and what it redirects to. Raises `FetchError` and network errors."""
        response = await self._request(self._check(text))
        limit = self._settings.max_bytes
        length = content_length(response)
        if response.status == 200 and (length is None or length <= limit):
            return _Transfer(response, length, limit, owner)
        await close(response)
        if response.status != 200:
            raise FetchError(response.status, code=1)
        raise FetchError(errno.EFBIG)

    async def _request(self, url: Url) -> "httpcore.Response":
        if self._pool is None:
            raise ServerStateError("the fetch handler answers between __aenter__ and __aexit__")
        left = self._settings.redirects
        while True:
            response = await self._pool.handle_async_request(get_request(url))
            location = header(response, b"location")
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


def _success(packet: BridgePacket, value2: int) -> BridgeResponse[int]:
    return BridgeResponse(Status(packet.method & 0xFF).encode(), value2)


def _invalid(packet: BridgePacket) -> BridgeResponse[int]:
    status = Status(packet.method & 0xFF, StatusKind.INVALID_PARAMETERS)
    return BridgeResponse(status.encode(), 0)


def _failed(packet: BridgePacket, native: int, code: int = 0) -> BridgeResponse[int]:
    status = Status(packet.method & 0xFF, StatusKind.FAILED, code, native)
    return BridgeResponse(status.encode(), 0)


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
