"""Guest memory behind page tables that a test makes up."""

import struct
from contextlib import contextmanager

import pytest
from hypothesis import settings
from laws import examples

from vmibridge.bridge.context import BridgeContext
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

laws = settings(max_examples=examples(150))

PAGE = 0x1000
P, W, U = 1, 2, 4
PG, WP, PAE, LMA = 0x8000_0000, 0x0001_0000, 0x20, 0x400
TOP = 1 << 64

# Three pages that are neighbours to the guest and stand apart in its physical memory.
FIRST, SECOND, THIRD = 0x40_0000, 0x40_1000, 0x40_2000
FRAMES = {FIRST: 0x9_0000, SECOND: 0x3_0000, THIRD: 0x6_0000}
BEHIND = 0x40_3000


def event_of(registers: Registers, ring: int = 0) -> TrapEvent:
    return TrapEvent(1, TrapReason.VMCALL, registers, length=3, ring=ring)


def page_tables(pages: dict[int, int], root: int = 0x10_0000) -> bytes:
    """4-level tables at `root` for pages of 4 KiB: virtual address to entry."""
    tables = bytearray(PAGE)
    for virtual, entry in pages.items():
        at = 0
        for shift in (39, 30, 21):
            place = at + 8 * (virtual >> shift & 0x1FF)
            (pointer,) = struct.unpack_from("<Q", tables, place)
            if not pointer:
                pointer = root + len(tables) | P | W | U
                struct.pack_into("<Q", tables, place, pointer)
                tables += bytes(PAGE)
            at = (pointer & ~0xFFF) - root
        struct.pack_into("<Q", tables, at + 8 * (virtual >> 12 & 0x1FF), entry)
    return bytes(tables)


def paged(
    frames: dict[int, bytes] | None = None,
    *,
    pages: dict[int, int] | None = None,
    ring: int = 0,
    cr0: int = PG | WP,
    backend: type[FakeBackend] = FakeBackend,
) -> tuple[BridgeContext, FakeBackend]:
    """A guest with `FIRST` to `THIRD` mapped, changed by `pages`; 0 maps nothing."""
    entries = {virtual: frame | P | W | U for virtual, frame in FRAMES.items()} | (pages or {})
    regions = {frame: bytes(PAGE) for frame in FRAMES.values()}
    regions |= {frame: data.ljust(PAGE, b"\0") for frame, data in (frames or {}).items()}
    vm = backend(memory=regions | {0x10_0000: page_tables(entries)})
    registers = Registers(cr0=cr0, cr3=0x10_0000, cr4=PAE, efer=LMA)
    return BridgeContext(event_of(registers, ring), vm), vm


def unpaged(regions: dict[int, bytes]) -> tuple[BridgeContext, FakeBackend]:
    vm = FakeBackend(memory=regions)
    return BridgeContext(event_of(Registers()), vm), vm


def finish(body):
    """Run a coroutine that never waits, as none does that reads a `FakeBackend`."""
    try:
        body.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


@contextmanager
def refused(address: int, reason: str):
    """Expect a `GuestMemoryError` that names `address`, and says why."""
    with pytest.raises(GuestMemoryError, match=reason) as caught:
        yield
    assert hex(caught.value.address) == hex(address)
    assert f"{address:#x}" in str(caught.value)


# One byte, by virtual address, in every way there is.
BY_VIRTUAL = {
    "read": lambda memory, address: memory.read(address, 1),
    "write": lambda memory, address: memory.write(address, b"x"),
    "read_string": lambda memory, address: memory.read_string(address),
    "read_utf16": lambda memory, address: memory.read_utf16(address),
}
BY_PHYSICAL = {
    "read_physical": lambda memory, address: memory.read_physical(address, 1),
    "write_physical": lambda memory, address: memory.write_physical(address, b"x"),
}


by_either = pytest.mark.parametrize(
    "access", (BY_VIRTUAL | BY_PHYSICAL).values(), ids=BY_VIRTUAL | BY_PHYSICAL
)

PATTERN = bytes(range(1, 252)) * 49  # 12,299 bytes, its period no divisor of a page
