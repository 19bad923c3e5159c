"""Large accesses to guest memory, over many pages, where a backend does many for the price of few.

What `vm.memory` does page by page is done here in a few steps: entries of page tables are read as
many at a time as are needed of one table; then all pages at once. The result is the same. Whatever
goes wrong is raised as it is found: the caller then does it page by page, which says exactly where.

Only for memory that is not tapped: what a recording has of an access stays as it is.
"""

import struct
from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from vmibridge.errors import GuestMemoryError
from vmibridge.vm.trap import TrapEvent

__all__ = [
    "MANY",
    "ManyAtOnce",
    "Pages",
    "check_pages",
    "part_of",
    "read_pages",
    "runs",
    "write_pages",
]

MANY = 16 << 10
"""Bytes of an access from which on it is large."""
_PAGE = 4096
_TABLE = 4096
"""Bytes of a page table, at most, and its alignment."""


@runtime_checkable
class ManyAtOnce(Protocol):
    """Physical memory that takes many accesses together."""

    async def read_each(
        self, event: TrapEvent, places: Sequence[tuple[int, int]]
    ) -> Sequence[bytes]:
        """The bytes at physical addresses, each with its size. Raises `GuestMemoryError`."""

    async def write_each(self, event: TrapEvent, parts: Sequence[tuple[int, bytes]]) -> None:
        """Write parts at physical addresses.

        Raises `GuestMemoryError` when one of them was not written; others may have been.
        """


Pages: TypeAlias = list[tuple[int, int]]
"""Physical address and bytes of each page of an access."""
_LAYOUTS = {4: "I", 8: "Q"}
"""Of entries of page tables, by their bytes."""


async def read_pages(memory: ManyAtOnce, event: TrapEvent, address: int, size: int) -> bytes:
    """`size` bytes at a virtual address. Raises `GuestMemoryError`."""
    pages = await _translated(memory, event, address, size, write=False)
    return b"".join(await memory.read_each(event, runs(pages)))


async def write_pages(memory: ManyAtOnce, event: TrapEvent, pages: Pages, data: bytes) -> None:
    """Put `data` where `check_pages` has looked. Raises `GuestMemoryError`."""
    parts: list[tuple[int, bytes]] = []
    at = 0
    for physical, count in runs(pages):
        parts.append((physical, data[at : at + count]))
        at += count
    await memory.write_each(event, parts)


async def check_pages(memory: ManyAtOnce, event: TrapEvent, address: int, size: int) -> Pages:
    """The pages of an access that may write. Raises `GuestMemoryError` unless all of it can."""
    pages = await _translated(memory, event, address, size, write=True)
    # As in `GuestMemory._check_writable`: both ends of what is larger than a page.
    places = [(physical, 1) for physical, _ in pages]
    places += [(physical + count - 1, 1) for physical, count in pages if count > _PAGE]
    await memory.read_each(event, places)
    return pages


def part_of(pages: Pages, skip: int, size: int) -> Pages:
    """`size` bytes of them, behind `skip` bytes."""
    part: Pages = []
    for physical, count in pages:
        if skip < count and size:
            taken = min(count - skip, size)
            part.append((physical + skip, taken))
            size -= taken
        skip = max(0, skip - count)
    return part


def runs(pages: Pages) -> Pages:
    """The same memory, where pages that follow each other are one piece."""
    found: Pages = []
    start = end = -1
    for physical, count in pages:
        if physical == end:
            end += count
        else:
            if end > start:
                found.append((start, end - start))
            start, end = physical, physical + count
    found.append((start, end - start))
    return found


async def _translated(
    memory: ManyAtOnce, event: TrapEvent, address: int, size: int, *, write: bool
) -> Pages:
    entries: dict[int, int] = {}
    pages: Pages = []
    walk, registers, ring = event.architecture.walk, event.registers, event.ring
    while size:
        # Mostly all entries are known by now, and nothing is awaited.
        steps = walk(registers, address, write=write, ring=ring)
        try:
            place, width = next(steps)
            while True:
                if place not in entries:
                    await _read_entries(memory, event, place, width, size, entries)
                place, width = steps.send(entries[place])
        except StopIteration as found:
            physical, left = found.value
            count = min(size, left)
            pages.append((physical, count))
            address += count
            size -= count
    return pages


async def _read_entries(
    memory: ManyAtOnce,
    event: TrapEvent,
    place: int,
    width: int,
    left: int,
    entries: dict[int, int],
) -> None:
    """Take an entry, and those behind it in its table, as far as `left` bytes may need them."""
    count = min(left // _PAGE + 2, (_TABLE - place % _TABLE) // width)
    if count < 1:
        raise GuestMemoryError(place, "an entry over the end of a page")
    (raw,) = await memory.read_each(event, [(place, count * width)])
    found = struct.unpack(f"<{count}{_LAYOUTS[width]}", raw)
    entries.update(zip(range(place, place + len(raw), width), found, strict=True))
