"""Guest memory as a handler sees it.

Virtual addresses go through the page tables of the trapping address space, with the
rights of the code that trapped (`arch.paging`). Every call is bounded, and every
failure is a `GuestMemoryError` that names the address.

The memory belongs to a trap, while its vCPU stands still. Its life:

| state | an access | comes by |
|---|---|---|
| attached | is done | the trap; a retry brings the next one |
| parked | waits for the next trap | the soft deadline: the guest was told to wait |
| closed | fails | the final answer |

An access that was under way when its trap left is restarted with the next one: what it
had translated may no longer be true. So nothing is ever read from, or written into, a
guest that runs.
"""

from collections.abc import Awaitable, Callable, Sequence
from operator import index
from typing import Protocol, TypeVar, cast

import anyio

from vmibridge.errors import GuestMemoryError
from vmibridge.text import type_name
from vmibridge.vm.arch.architecture import Page
from vmibridge.vm.many_pages import (
    MANY,
    ManyAtOnce,
    Pages,
    check_pages,
    part_of,
    read_pages,
    write_pages,
)
from vmibridge.vm.read_now import read_now
from vmibridge.vm.trap import TrapEvent

__all__ = ["MAX_ACCESS", "GuestMemory", "PhysicalMemory"]

MAX_ACCESS = 16 << 20
"""Bytes that one call may read or write: a guest's length is not to be trusted."""

R = TypeVar("R")
S = TypeVar("S")


class PhysicalMemory(Protocol):
    """What a backend offers: bytes by physical address, while the vCPU stands still."""

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises `GuestMemoryError` where the VM has no memory."""

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or, with `GuestMemoryError`, nothing."""


class _TrapLeftError(Exception):
    """The trap of this access is answered; the request may get another one."""


class GuestMemory:
    """Memory of the guest, for the time of one request."""

    __slots__ = (
        "_accesses",
        "_attached",
        "_checked",
        "_closed",
        "_event",
        "_physical",
        "_settled",
        "_waiting",
    )

    def __init__(self, physical: PhysicalMemory, event: TrapEvent) -> None:
        self._physical = physical
        self._event: TrapEvent | None = event
        self._closed = False
        self._attached: anyio.Event | None = None
        self._accesses = self._waiting = 0
        self._settled: anyio.Event | None = None
        self._checked: tuple[TrapEvent, int, int, Pages] | None = None
        """Where `check_writable` has looked last: the trap, address, size, and the pages, which are
        those of the trap as a translation that a processor keeps is until it is told otherwise."""

    def close(self) -> None:
        """From here on every access fails: the guest runs again."""
        self._closed = True
        self.attach(None)

    def park(self) -> None:
        """From here on an access waits for `attach`: the guest runs for now."""
        self._event = None
        if self._attached is None:
            self._attached = anyio.Event()

    def attach(self, event: TrapEvent | None) -> None:
        """Go on with another trap of the guest."""
        self._event = event
        if self._attached is not None:
            self._attached.set()
            self._attached = None

    @property
    def is_awaited(self) -> bool:
        """Whether an access waits for `attach`."""
        return self._waiting > 0

    async def settled(self) -> None:
        """Wait until no access is under way in the VM."""
        while self._accesses:
            if self._settled is None:
                self._settled = anyio.Event()
            await self._settled.wait()

    async def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a virtual address.

        Raises `GuestMemoryError` for an address that the guest could not read, a
        size over `MAX_ACCESS`, and after the final answer. Cancelling it has no effect
        on the guest.
        """
        address, size = _bound(address, size)
        event = self._event
        if event is not None and size:
            data = read_now(self._physical, event, address, size)
            if data is not None:
                return data
        return await self._in_one_trap(self._read, address, size)

    async def write(self, address: int, data: bytes) -> None:
        """Put `data` at a virtual address.

        Nothing is written unless all of the range can be. Raises `GuestMemoryError`
        as `read` does, and for read-only pages. Cancelled in between, a write of
        several pages may be left in part.
        """
        data = plain_bytes(data)
        address, _ = _bound(address, len(data))
        await self._in_one_trap(self._write, address, data)

    async def check_writable(self, address: int, size: int) -> None:
        """Raise as `write` would for `size` bytes at a virtual address, and write nothing.

        The guest may change its page tables when it runs again, so it holds for this trap.
        """
        address, size = _bound(address, size)
        await self._in_one_trap(self._check_writable, address, size)

    async def read_string(self, address: int, limit: int = 4096, encoding: str = "utf-8") -> str:
        """Text that ends at a NUL byte, or after `limit` bytes.

        Bytes that are no text become U+FFFD, so this never raises `UnicodeError`.
        Raises `GuestMemoryError` when a page before the end is not mapped.
        """
        return (await self._read_text(address, limit, b"\0")).decode(encoding, "replace")

    async def read_utf16(self, address: int, limit: int = 4096) -> str:
        """UTF-16LE text that ends at a NUL character, or after `limit` bytes.

        Lone surrogates become U+FFFD. Raises as `read_string` does.
        """
        raw = await self._read_text(address, limit & ~1, b"\0\0")
        return raw.decode("utf-16-le", "replace")

    async def read_c_string(self, address: int, limit: int) -> bytes:
        """The bytes before a NUL, at most `limit` of them: for what must not be cut short.

        Raises `GuestMemoryError` when there is no NUL within `limit` + 1 bytes, and as
        `read_string` does.
        """
        found = await self._read_text(address, limit + 1, b"\0")
        if len(found) > limit:
            raise GuestMemoryError(address, f"no NUL within {limit} bytes")
        return found

    async def read_c_utf16(self, address: int, limit: int) -> bytes:
        """The same for UTF-16: the bytes before a NUL character, at most `limit` of them."""
        limit &= ~1
        found = await self._read_text(address, limit + 2, b"\0\0")
        if len(found) > limit:
            raise GuestMemoryError(address, f"no NUL within {limit} bytes")
        return found

    async def read_physical(self, address: int, size: int) -> bytes:
        """`size` bytes at a physical address. Raises `GuestMemoryError`."""
        address, size = _bound(address, size)
        return await self._in_one_trap(self._get, address, size)

    async def write_physical(self, address: int, data: bytes) -> None:
        """Put `data` at a physical address. Raises `GuestMemoryError`."""
        data = plain_bytes(data)
        address, _ = _bound(address, len(data))
        await self._in_one_trap(self._put, address, data)

    async def _in_one_trap(
        self, access: Callable[[TrapEvent, int, S], Awaitable[R]], address: int, what: S
    ) -> R:
        """Do it all in the same trap: start over when the trap leaves in between."""
        while True:
            if self._closed:
                raise GuestMemoryError(address, "the trap is answered: the guest runs again")
            event = self._event
            if event is None:
                assert self._attached is not None
                self._waiting += 1
                try:
                    await self._attached.wait()
                finally:
                    self._waiting -= 1
                continue
            try:
                return await access(event, address, what)
            except _TrapLeftError:
                continue

    async def _at_once(
        self, event: TrapEvent, access: Callable[[ManyAtOnce], Awaitable[R]]
    ) -> R | None:
        """Do a large access where the memory does many at once; `None`: do it page by page."""
        physical = self._physical
        # Not `isinstance`, which looks at each member of the protocol each time: 20 us.
        if not issubclass(type(physical), ManyAtOnce):
            return None
        many = cast("ManyAtOnce", physical)
        try:
            return await access(_InOneTrap(many, self._begin, self._accessed))
        except GuestMemoryError:
            # Page by page it is found out where.
            return None

    async def _read(self, event: TrapEvent, address: int, size: int) -> bytes:
        if size > MANY:
            data = await self._at_once(event, lambda many: read_pages(many, event, address, size))
            if data is not None:
                return data
        parts = []
        while size:
            page = await self._translate(event, address, write=False)
            count = min(size, page.left)
            parts.append(await self._fetch(event, address, page.physical, count))
            address += count
            size -= count
        return b"".join(parts)

    async def _write(self, event: TrapEvent, address: int, data: bytes) -> None:
        if len(data) > MANY and await self._at_once(
            event, lambda many: self._write_at_once(many, event, address, data)
        ):
            return
        places: list[tuple[int, int, bytes]] = []
        at = 0
        while at < len(data):
            page = await self._translate(event, address + at, write=True)
            part = data[at : at + page.left]
            places.append((address + at, page.physical, part))
            at += len(part)
        if len(places) > 1:
            for start, physical, part in places:
                await self._fetch(event, start, physical, len(part))
        for start, physical, part in places:
            try:
                await self._put(event, physical, part)
            except GuestMemoryError as error:
                raise GuestMemoryError(start, error.reason) from error

    async def _write_at_once(
        self, many: ManyAtOnce, event: TrapEvent, address: int, data: bytes
    ) -> bool:
        size, known = len(data), self._checked
        if known is not None and known[0] is event and 0 <= address - known[1] <= known[2] - size:
            pages = part_of(known[3], address - known[1], size)
        else:
            pages = await check_pages(many, event, address, size)
        await write_pages(many, event, pages, data)
        return True

    async def _check_at_once(
        self, many: ManyAtOnce, event: TrapEvent, address: int, size: int
    ) -> bool:
        self._checked = (event, address, size, await check_pages(many, event, address, size))
        return True

    async def _check_writable(self, event: TrapEvent, address: int, size: int) -> None:
        if size > MANY and await self._at_once(
            event, lambda many: self._check_at_once(many, event, address, size)
        ):
            return
        while size > 0:
            page = await self._translate(event, address, write=True)
            count = min(size, page.left)
            # Page tables may lead to where there is no memory, and without paging nothing else says
            # so. Both ends are looked at: memory has no holes of less than a page.
            await self._fetch(event, address, page.physical, 1)
            if count > 1:
                await self._fetch(event, address + count - 1, page.physical + count - 1, 1)
            address += count
            size -= count

    async def _read_text(self, address: int, limit: int, end: bytes) -> bytes:
        address, _ = _bound(address, 0)
        limit = _whole(limit, "a limit")
        _bound(address, min(limit, (1 << 64) - address))
        return await self._in_one_trap(
            lambda event, start, most: self._read_until(event, start, most, end), address, limit
        )

    async def _read_until(self, event: TrapEvent, address: int, limit: int, end: bytes) -> bytes:
        # To the next 4 KiB boundary at a time: what lies behind the end need neither be
        # mapped nor, where a large page or no paging maps it, be memory or an address.
        found = bytearray()
        width = len(end)
        while len(found) < limit:
            start = address + len(found)
            _bound(start, 1)
            count = min(limit - len(found), 4096 - start % 4096)
            searched = len(found) - len(found) % width
            self._check(event)
            part = read_now(self._physical, event, start, count)
            if part is None:
                page = await self._translate(event, start, write=False)
                part = await self._fetch(event, start, page.physical, min(count, page.left))
            found += part
            at = found.find(end, searched)
            while at % width and at >= 0:
                at = found.find(end, at + 1)
            if at >= 0:
                return bytes(found[:at])
        return bytes(found)

    async def _translate(self, event: TrapEvent, address: int, *, write: bool) -> Page:
        walk = event.architecture.walk
        steps = walk(event.registers, address, write=write, ring=event.ring)
        try:
            place, size = next(steps)
            while True:
                try:
                    entry = await self._get(event, place, size)
                except GuestMemoryError as error:
                    raise GuestMemoryError(address, "its page table is not in memory") from error
                place, size = steps.send(int.from_bytes(entry, "little"))
        except StopIteration as found:
            page: Page = found.value
            return page

    async def _fetch(self, event: TrapEvent, address: int, physical: int, size: int) -> bytes:
        # The caller asked by virtual address, so that is what an error names.
        try:
            return await self._get(event, physical, size)
        except GuestMemoryError as error:
            raise GuestMemoryError(address, error.reason) from error

    async def _get(self, event: TrapEvent, address: int, size: int) -> bytes:
        self._check(event)
        if not size:
            return b""
        self._accesses += 1
        try:
            return await self._physical.read_physical(event, address, size)
        finally:
            self._accessed()

    async def _put(self, event: TrapEvent, address: int, data: bytes) -> None:
        self._check(event)
        if not data:
            return
        self._accesses += 1
        try:
            await self._physical.write_physical(event, address, data)
        finally:
            self._accessed()

    def _check(self, event: TrapEvent) -> None:
        if event is not self._event:
            raise _TrapLeftError

    def _begin(self, event: TrapEvent) -> None:
        self._check(event)
        self._accesses += 1

    def _accessed(self) -> None:
        self._accesses -= 1
        if self._settled is not None and not self._accesses:
            self._settled.set()
            self._settled = None


def plain_bytes(data: bytes) -> bytes:
    """`data` as exact bytes: what goes on from here may be sent to another machine, and recorded.

    Whatever has a buffer is copied, so that it does not change on the way. Raises `TypeError` for
    what has none, `GuestMemoryError` for more than `MAX_ACCESS` bytes.
    """
    if type(data) is bytes:
        return data
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"guest memory takes bytes, not {type_name(data)}") from None
    _bound(0, view.nbytes)
    return view.tobytes()


def _whole(value: int, name: str) -> int:
    """An exact `int`. Raises `TypeError`."""
    if type(value) is int:
        return value
    try:
        return index(value)
    except Exception as error:
        # `__index__` may raise anything.
        raise TypeError(f"{name} is a whole number, not of type {type_name(value)}") from error


class _InOneTrap:
    """The memory of a trap for an access of several steps: each is done while the trap is there."""

    def __init__(
        self, memory: ManyAtOnce, begin: Callable[[TrapEvent], None], end: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._begin = begin
        self._end = end

    async def read_each(
        self, event: TrapEvent, places: Sequence[tuple[int, int]]
    ) -> Sequence[bytes]:
        self._begin(event)
        try:
            return await self._memory.read_each(event, places)
        finally:
            self._end()

    async def write_each(self, event: TrapEvent, parts: Sequence[tuple[int, bytes]]) -> None:
        self._begin(event)
        try:
            await self._memory.write_each(event, parts)
        finally:
            self._end()


def _bound(address: int, size: int) -> tuple[int, int]:
    """Both, as exact numbers."""
    address, size = _whole(address, "an address"), _whole(size, "a size")
    if not 0 <= size <= MAX_ACCESS:
        raise GuestMemoryError(address, f"{size} bytes asked for, {MAX_ACCESS} is the most")
    if address < 0 or address + size > 1 << 64:
        raise GuestMemoryError(address, "beyond 64 bits")
    return address, size
