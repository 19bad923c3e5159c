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

Its methods take the packet, and not typed parameters, since guests rely on what is answered. A
typed method would have the number of the wrong parameter in the code of *invalid parameters*, and
would answer *touch* where a page is not present. READ has three words, which VMCALL of 32-bit code
would have to put into a block of memory, and a default for the third; and a handle that is not open
is *invalid parameters* here, which the body of a typed method cannot answer.
"""

import errno
from ipaddress import ip_network
from types import TracebackType
from typing import Self

import anyio
import msgspec

from vmibridge import (
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    StandardHandler,
    Status,
    StatusKind,
    method,
)
from vmibridge.errors import MissingExtraError
from vmibridge.handlers._fetch_network import FetchError, httpcore
from vmibridge.handlers._fetch_requests import Client, close, content_length, network_errors
from vmibridge.handlers._fetch_transfers import MAX_HANDLE, Transfer, Transfers
from vmibridge.handlers._fetch_urls import MAX_URL, parse_prefix

MAX_CAPACITY = 64 << 10
"""Bytes that one READ may ask for."""
DEFAULT_CAPACITY = 4096
"""Bytes of a buffer whose capacity is given as 0, as by every x86 VMCALL."""
UNKNOWN_LENGTH = (1 << 64) - 1


class Fetch(StandardHandler[int]):
    """Streams allowed URLs into the guest. The output of READ is the bytes written.

    Uses no proxy, sends no credentials, and trusts the certificates that the system
    trusts (`SSL_CERT_FILE` adds others). Raises `MissingExtraError` without httpcore.
    """

    REQUEST = 0x0023

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
        self._client = Client(
            [parse_prefix(entry) for entry in self._settings.allow],
            [ip_network(entry) for entry in self._settings.private],
            self._settings.redirects,
        )
        self._transfers = Transfers(self._settings.idle_timeout)
        self._opening = 0
        self._network_errors = network_errors()

    async def __aenter__(self) -> Self:
        """Make the pool of connections."""
        self._client.open(keep=self._settings.max_open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all transfers and connections, also while being cancelled."""
        await self._transfers.end_all()
        await self._client.aclose()

    @method(0x0001)
    async def open(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """Ask for a URL; answer when the headers are there."""
        try:
            # Latin-1 takes any byte; what is not ASCII is refused with the URL.
            url = (await vmi.memory.read_c_string(packet.value1, MAX_URL)).decode("latin-1")
        except GuestMemoryError:
            return _invalid(packet)
        await self._transfers.reclaim()
        if len(self._transfers) + self._opening >= self._settings.max_open:
            return _failed(packet, errno.EMFILE)
        self._opening += 1
        try:
            transfer = await self._start(url, vmi.event.caller)
        except FetchError as error:
            return _failed(packet, error.native, error.code)
        except self._network_errors:
            return _failed(packet, errno.EIO)
        finally:
            self._opening -= 1
        return _success(packet, self._transfers.add(transfer))

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
                await self._transfers.end(packet.value1, transfer)

    @method(0x0003)
    async def close(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """End a transfer and free its handle."""
        transfer = self._find(vmi, packet)
        if transfer is None:
            return _invalid(packet)
        if transfer.busy:
            return _failed(packet, errno.EBUSY)
        await self._transfers.end(packet.value1, transfer)
        return _success(packet, 0)

    @method(0x0004)
    async def length(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """Tell the length of the content; an x86 guest gets the low 32 bits."""
        transfer = self._find(vmi, packet)
        if transfer is None:
            return _invalid(packet)
        return _success(packet, UNKNOWN_LENGTH if transfer.length is None else transfer.length)

    def _find(self, vmi: BridgeContext, packet: BridgePacket) -> Transfer | None:
        return self._transfers.find(packet.value1, vmi.event.caller)

    async def _start(self, text: str, owner: int) -> Transfer:
        """Request a URL and what it redirects to. Raises `FetchError` and network errors."""
        response = await self._client.get(text)
        limit = self._settings.max_bytes
        length = content_length(response)
        if response.status == 200 and (length is None or length <= limit):
            return Transfer(response, length, limit, owner)
        await close(response)
        if response.status != 200:
            raise FetchError(response.status, code=1)
        raise FetchError(errno.EFBIG)


def _success(packet: BridgePacket, value2: int) -> BridgeResponse[int]:
    return BridgeResponse(Status(packet.method & 0xFF).encode(), value2)


def _invalid(packet: BridgePacket) -> BridgeResponse[int]:
    status = Status(packet.method & 0xFF, StatusKind.INVALID_PARAMETERS)
    return BridgeResponse(status.encode(), 0)


def _failed(packet: BridgePacket, native: int, code: int = 0) -> BridgeResponse[int]:
    status = Status(packet.method & 0xFF, StatusKind.FAILED, code, native)
    return BridgeResponse(status.encode(), 0)
