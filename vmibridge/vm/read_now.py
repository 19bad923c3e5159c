"""Reads of guest memory that need not wait, where a backend has the memory at hand.

A shortcut beside `vm.memory` and `vm.many_pages`: all of it is done by plain calls, without a
coroutine for each entry of a page table. What is not as simple as that gives `None`: the caller
then does it by the long way, which says what is wrong, and where.

Nothing is kept from one read to the next: page tables count as they are now.

Only for memory that is neither tapped nor metered.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias, cast, runtime_checkable

from vmibridge.vm.many_pages import runs
from vmibridge.vm.trap import TrapEvent

__all__ = ["PhysicalReader", "ReadsNow", "read_now", "read_virtual"]

PhysicalReader: TypeAlias = Callable[[int, int], bytes | None]
"""The bytes at a physical address, given their number. `None`: they are not to be had at once, or
not at all."""


@runtime_checkable
class ReadsNow(Protocol):
    """Memory of which some is read without waiting."""

    def read_now(self, event: TrapEvent, address: int, size: int) -> bytes | None:
        """`size` bytes, at least one, at a virtual address, as `read_virtual` has them.

        `None`: ask `read_physical`, also where that would raise.
        """


def read_now(physical: object, event: TrapEvent, address: int, size: int) -> bytes | None:
    """What the memory has without waiting; `None` also for one that always waits."""
    # Not `isinstance`, which looks at each member of the protocol each time: 20 us.
    if not issubclass(type(physical), ReadsNow):
        return None
    return cast("ReadsNow", physical).read_now(event, address, size)


def read_virtual(read: PhysicalReader, event: TrapEvent, address: int, size: int) -> bytes | None:
    """`size` bytes at a virtual address, by a backend's reader of physical memory."""
    pages = event.architecture.pages
    found = None if pages is None else pages(read, event.registers, address, size, event.ring)
    if found is None:
        return None
    if len(found) == 1:
        return read(*found[0])
    parts: list[bytes] = []
    for start, count in runs(found):
        part = read(start, count)
        if part is None:
            return None
        parts.append(part)
    return b"".join(parts)
