"""Transfers of the fetch handler: what is open, by its handle, and on its way into the guest."""

import errno
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from vmibridge.handlers._fetch_network import CLOSE_TIMEOUT, FetchError
from vmibridge.handlers._fetch_requests import close, network_errors

if TYPE_CHECKING:
    import httpcore

__all__ = ["MAX_HANDLE", "Transfer", "Transfers"]

MAX_HANDLE = 4095


class Transfer:
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


class Transfers:
    """Those that are open, in all address spaces of a VM."""

    def __init__(self, idle_timeout: float) -> None:
        """`idle_timeout`: seconds after which one that was not used may be taken back."""
        self._idle_timeout = idle_timeout
        self._by_handle: dict[int, Transfer] = {}
        self._last_handle = 0

    def __len__(self) -> int:
        return len(self._by_handle)

    def add(self, transfer: Transfer) -> int:
        """Keep it, and return its handle: in turn, so that one that was closed is not soon
        another transfer's."""
        handle = self._last_handle
        while True:
            handle = handle % MAX_HANDLE + 1
            if handle not in self._by_handle:
                self._last_handle = handle
                self._by_handle[handle] = transfer
                return handle

    def find(self, handle: int, owner: int) -> Transfer | None:
        """The transfer that this address space has opened."""
        transfer = self._by_handle.get(handle)
        return transfer if transfer is not None and transfer.owner == owner else None

    async def end(self, handle: int, transfer: Transfer) -> None:
        """Close it, and free its handle unless that is another transfer's by now."""
        if self._by_handle.get(handle) is transfer:
            del self._by_handle[handle]
        await transfer.aclose()

    async def reclaim(self) -> None:
        """End those that were not used for a while."""
        oldest = anyio.current_time() - self._idle_timeout
        idle = [
            handle
            for handle, transfer in self._by_handle.items()
            if not transfer.busy and transfer.used < oldest
        ]
        for transfer in [self._by_handle.pop(handle) for handle in idle]:
            await transfer.aclose()

    async def end_all(self) -> None:
        """End all, also while being cancelled."""
        while self._by_handle:
            _, transfer = self._by_handle.popitem()
            await transfer.aclose()
