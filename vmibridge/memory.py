"""Guest memory as a handler sees it.

Virtual addresses go through the page tables of the trapping address space, with the
rights of the code that trapped (`arch.paging`). Every call is bounded, and every
failure is a `GuestMemoryError` that names the address. Once the trap is answered the
guest runs again, and its memory can no longer be reached through this object.
"""

from typing import Protocol

from vmibridge.arch.paging import Page, walk
from vmibridge.errors import GuestMemoryError
from vmibridge.event import TrapEvent

MAX_ACCESS = 16 << 20
"""Bytes that one call may read or write: a guest's length is not to be trusted."""

_PAGE = 4096


class PhysicalMemory(Protocol):
    """What a backend offers: bytes by physical address, while the vCPU stands still."""

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises `GuestMemoryError` where the VM has no memory."""

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or, with `GuestMemoryError`, nothing."""


class GuestMemory:
    """Memory of the guest, for the time of one trap."""

    __slots__ = ("_event", "_open", "_physical")

    def __init__(self, physical: PhysicalMemory, event: TrapEvent) -> None:
        self._physical = physical
        self._event = event
        self._open = True

    def close(self) -> None:
        """From here on every access fails: the guest runs again."""
        self._open = False

    async def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a virtual address.

        Raises `GuestMemoryError` for an address that the guest could not read, a
        size over `MAX_ACCESS`, and after the answer. Cancelling it has no effect on
        the guest.
        """
        self._bound(address, size)
        parts = []
        while size:
            page = await self._translate(address, write=False)
            count = min(size, page.left)
            parts.append(await self._fetch(address, page.physical, count))
            address += count
            size -= count
        return b"".join(parts)

    async def write(self, address: int, data: bytes) -> None:
        """Put `data` at a virtual address.

        Nothing is written unless all of the range can be. Raises `GuestMemoryError`
        as `read` does, and for read-only pages. Cancelled in between, a write of
        several pages may be left in part.
        """
        self._bound(address, len(data))
        places: list[tuple[int, int, bytes]] = []
        at = 0
        while at < len(data):
            page = await self._translate(address + at, write=True)
            part = data[at : at + page.left]
            places.append((address + at, page.physical, part))
            at += len(part)
        if len(places) > 1:
            for start, physical, part in places:
                await self._fetch(start, physical, len(part))
        for start, physical, part in places:
            self._bound(start, 0)
            try:
                await self._physical.write_physical(self._event, physical, part)
            except GuestMemoryError as error:
                raise GuestMemoryError(start, error.reason) from error

    async def read_string(self, address: int, limit: int = 4096, encoding: str = "utf-8") -> str:
        """Text that ends at a NUL byte, or after `limit` bytes.

        Bytes that are no text become U+FFFD, so this never raises `UnicodeError`.
        Raises `GuestMemoryError` when a page before the end is not mapped.
        """
        return (await self._read_until(address, limit, b"\0")).decode(encoding, "replace")

    async def read_utf16(self, address: int, limit: int = 4096) -> str:
        """UTF-16LE text that ends at a NUL character, or after `limit` bytes.

        Lone surrogates become U+FFFD. Raises as `read_string` does.
        """
        raw = await self._read_until(address, limit & ~1, b"\0\0")
        return raw.decode("utf-16-le", "replace")

    async def read_c_string(self, address: int, limit: int) -> bytes:
        """The bytes before a NUL, at most `limit` of them: for what must not be cut short.

        Raises `GuestMemoryError` when there is no NUL within `limit` + 1 bytes, and as
        `read_string` does.
        """
        found = await self._read_until(address, limit + 1, b"\0")
        if len(found) > limit:
            raise GuestMemoryError(address, f"no NUL within {limit} bytes")
        return found

    async def read_physical(self, address: int, size: int) -> bytes:
        """`size` bytes at a physical address. Raises `GuestMemoryError`."""
        self._bound(address, size)
        return await self._physical.read_physical(self._event, address, size) if size else b""

    async def write_physical(self, address: int, data: bytes) -> None:
        """Put `data` at a physical address. Raises `GuestMemoryError`."""
        self._bound(address, len(data))
        if data:
            await self._physical.write_physical(self._event, address, data)

    async def _read_until(self, address: int, limit: int, end: bytes) -> bytes:
        # To the next 4 KiB boundary at a time: what lies behind the end need neither be
        # mapped nor, where a large page or no paging maps it, be memory or an address.
        self._bound(address, 0)
        self._bound(address, min(limit, (1 << 64) - address))
        found = bytearray()
        width = len(end)
        while len(found) < limit:
            start = address + len(found)
            self._bound(start, 1)
            page = await self._translate(start, write=False)
            count = min(limit - len(found), page.left, 4096 - start % 4096)
            searched = len(found) - len(found) % width
            found += await self._fetch(start, page.physical, count)
            at = found.find(end, searched)
            while at % width and at >= 0:
                at = found.find(end, at + 1)
            if at >= 0:
                return bytes(found[:at])
        return bytes(found)

    async def _translate(self, address: int, *, write: bool) -> Page:
        event = self._event
        steps = walk(event.registers, address, write=write, ring=event.ring)
        try:
            place, size = next(steps)
            while True:
                self._bound(address, 0)
                try:
                    entry = await self._physical.read_physical(event, place, size)
                except GuestMemoryError as error:
                    raise GuestMemoryError(address, "its page table is not in memory") from error
                place, size = steps.send(int.from_bytes(entry, "little"))
        except StopIteration as found:
            page: Page = found.value
            return page

    async def _fetch(self, address: int, physical: int, size: int) -> bytes:
        # The caller asked by virtual address, so that is what an error names.
        self._bound(address, 0)
        try:
            return await self._physical.read_physical(self._event, physical, size)
        except GuestMemoryError as error:
            raise GuestMemoryError(address, error.reason) from error

    def _bound(self, address: int, size: int) -> None:
        if not self._open:
            raise GuestMemoryError(address, "the trap is answered: the guest runs again")
        if not 0 <= size <= MAX_ACCESS:
            raise GuestMemoryError(address, f"{size} bytes asked for, {MAX_ACCESS} is the most")
        if address < 0 or address + size > 1 << 64:
            raise GuestMemoryError(address, "beyond 64 bits")
