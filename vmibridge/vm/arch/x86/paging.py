"""The page walk: from a virtual to a physical address, as the guest's MMU does it.

A walk is a generator: it yields the physical address and the size in bytes of each
entry that it needs and is sent the entry, so it runs over any memory without I/O of
its own. Intel SDM volume 3, chapter 4; the widths are those of tables 4-2 to 4-19.

| mode | when | levels |
|---|---|---|
| none | CR0.PG clear | the address is physical |
| 32-bit | CR4.PAE clear | 2 of 10 bits, entries of 4 bytes, 4 MiB pages with CR4.PSE |
| PAE | CR4.PAE, not long mode | 2 bits, then 2 of 9, 2 MiB pages |
| 4-level | long mode | 4 of 9 bits, 2 MiB and 1 GiB pages |
| 5-level | long mode, CR4.LA57 | 5 of 9 bits |

Access is checked as the trapping code's own: ring 3 reaches user pages only, and a
write needs writable pages (in rings 0 to 2: where CR0.WP asks for it). Otherwise a
guest's user process could have its kernel's memory read or written by a handler.
"""

import struct
from collections.abc import Callable

from vmibridge.errors import GuestMemoryError, GuestPageFaultError
from vmibridge.vm.arch.architecture import Page, Walk
from vmibridge.vm.arch.x86.registers import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    Registers,
)

_PRESENT = 1 << 0
_WRITABLE = 1 << 1
_USER = 1 << 2
_LARGE = 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000


def walk(registers: Registers, address: int, *, write: bool = False, ring: int = 0) -> Walk:
    """Translate one virtual address with the paging state in `registers`.

    Raises `GuestMemoryError`, with the virtual address, where the guest itself would
    fault: not canonical, not mapped, or not allowed in this ring.
    """
    if not registers.cr0 & CR0_PG:
        # To the top of the address space: without paging nothing else bounds it.
        return Page(address, (1 << 64) - address)
    long_mode = bool(registers.efer & EFER_LMA)
    if not long_mode and address >> 32:
        raise GuestMemoryError(address, "beyond 32 bits")
    if not long_mode and not registers.cr4 & CR4_PAE:
        return (yield from _walk_32bit(registers, address, write, ring))
    table, levels = registers.cr3 & _ADDRESS, 5 if registers.cr4 & CR4_LA57 else 4
    rights = _WRITABLE | _USER
    if long_mode:
        # The highest bit that is translated, and all bits above it, have to be equal.
        unused = 64 - 12 - 9 * levels
        if address >> (63 - unused) not in (0, (2 << unused) - 1):
            raise GuestMemoryError(address, "not canonical")
    else:
        # The four pointers of PAE carry neither rights nor large pages.
        pointer = yield (registers.cr3 & 0xFFFF_FFE0) + 8 * (address >> 30), 8
        if not pointer & _PRESENT:
            raise GuestPageFaultError(address, "not mapped")
        table, levels = pointer & _ADDRESS, 2
    level = levels
    while True:
        level -= 1
        shift = 12 + 9 * level
        entry = yield table + 8 * (address >> shift & 0x1FF), 8
        if not entry & _PRESENT:
            raise GuestPageFaultError(address, "not mapped")
        # A right is one of the page only if the entry of every level has it.
        rights &= entry
        # Bit 7 is PAT in an entry of level 0, and reserved above level 2.
        if level == 0 or (level <= 2 and entry & _LARGE):
            _check(registers, address, rights, write, ring)
            return _page(entry & _ADDRESS, address, shift)
        table = entry & _ADDRESS


def pages(
    read: Callable[[int, int], bytes | None],
    registers: Registers,
    address: int,
    size: int,
    ring: int,
) -> list[tuple[int, int]] | None:
    """Where a range that is to be read leads: what `walk` says of each page, in fewer steps.

    `None` for what would fault, and for what is not done here: paging that is not of long mode, and
    a range that is not in one half of the address space.
    """
    if not registers.cr0 & CR0_PG:
        return [(address, size)]
    top = 4 if registers.cr4 & CR4_LA57 else 3
    half, end = 1 << (12 + 9 * top + 8), address + size
    if not registers.efer & EFER_LMA or not (end <= half or (1 << 64) - half <= address):
        return None
    # Each level has to grant a right, as in `walk`.
    needed = _PRESENT | _USER if ring == 3 else _PRESENT
    found: list[tuple[int, int]] = []
    at = address & ~0xFFF
    while at < end:
        table, level = registers.cr3 & _ADDRESS, top
        while level:
            raw = read(table + 8 * (at >> 12 + 9 * level & 0x1FF), 8)
            entry = 0 if raw is None else int.from_bytes(raw, "little")
            if entry & needed != needed:
                return None
            table = entry & _ADDRESS
            if entry & _LARGE and level <= 2:
                break
            level -= 1
        if level:
            page = _page(table, at, 12 + 9 * level)
            found.append(page)
            at += page.left
            continue
        first = at >> 12 & 0x1FF
        count = min(512 - first, (end - at + 0xFFF) >> 12)
        raw = read(table + 8 * first, 8 * count)
        if raw is None:
            return None
        for entry in struct.unpack(f"<{count}Q", raw):
            if entry & needed != needed:
                return None
            found.append((entry & _ADDRESS, 4096))
        at += count << 12
    physical, left = found[0]
    found[0] = physical + (address & 0xFFF), left - (address & 0xFFF)
    physical, left = found[-1]
    found[-1] = physical, left - (at - end)
    return found


def _walk_32bit(registers: Registers, address: int, write: bool, ring: int) -> Walk:
    rights = _WRITABLE | _USER
    entry = yield (registers.cr3 & 0xFFFF_F000) + 4 * (address >> 22), 4
    if not entry & _PRESENT:
        raise GuestPageFaultError(address, "not mapped")
    rights &= entry
    if entry & _LARGE and registers.cr4 & CR4_PSE:
        _check(registers, address, rights, write, ring)
        # PSE-36: bits 13-20 are bits 32-39 of the page's address.
        return _page(entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32, address, 22)
    entry = yield (entry & 0xFFFF_F000) + 4 * (address >> 12 & 0x3FF), 4
    if not entry & _PRESENT:
        raise GuestPageFaultError(address, "not mapped")
    _check(registers, address, rights & entry, write, ring)
    return _page(entry & 0xFFFF_F000, address, 12)


def _page(base: int, address: int, shift: int) -> Page:
    offset = address & (1 << shift) - 1
    # In the entry of a large page lower bits are no address: bit 12 is PAT.
    return Page(base >> shift << shift | offset, (1 << shift) - offset)


def _check(registers: Registers, address: int, rights: int, write: bool, ring: int) -> None:
    if ring == 3 and not rights & _USER:
        raise GuestMemoryError(address, "a supervisor page, asked for in ring 3")
    if write and not rights & _WRITABLE and (ring == 3 or registers.cr0 & CR0_WP):
        raise GuestPageFaultError(address, "a read-only page")
