"""A range is translated at once to what the page walk says of each of its pages, or not at all."""

from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.errors import GuestMemoryError
from vmibridge.vm.arch.x86.paging import pages, walk
from vmibridge.vm.trap import Registers

PAGE = 4096
PG, WP, PSE, PAE, LA57, LMA = 0x8000_0000, 0x0001_0000, 0x10, 0x20, 0x1000, 0x400
P, W, U, LARGE, NX = 1, 2, 4, 0x80, 1 << 63
TOP = 1 << 64
MODES = {"4-level": (PG, PAE, LMA), "5-level": (PG, PAE | LA57, LMA), "none": (0, 0, 0)}
OTHERS = {"32-bit": (PG, PSE, 0), "PAE": (PG, PAE, 0)}
BORDERS = [0, 1 << 21, 1 << 30, 1 << 39, 1 << 47, 1 << 56]
STARTS = [*BORDERS, *(TOP - border for border in BORDERS), 0x7FFF_1234_5000]


class Tables:
    """Memory in which each 8 bytes are a page-table entry, made up by their address."""

    def __init__(self, seed, faults):
        self.seed, self.faults = seed, faults

    def entry(self, place):
        chance = Random(self.seed ^ place)
        frame = chance.choice([0x1000 * (place >> 3 & 0xFFFF), chance.getrandbits(52) & ~0xFFF])
        rights = P | W | U
        if chance.random() < self.faults:
            rights = chance.choice([0, P, P | W, P | U, W | U])
        return frame | rights | chance.choice([0, 0, LARGE]) | chance.choice([0, NX, 0x60])

    def read(self, place, size):
        return b"".join(
            self.entry(at).to_bytes(8, "little") for at in range(place, place + size, 8)
        )

    def walk(self, registers, address, ring):
        steps = walk(registers, address, ring=ring)
        try:
            place, _ = next(steps)
            while True:
                place, _ = steps.send(self.entry(place))
        except StopIteration as end:
            return end.value.physical


def by_walk(tables, registers, address, size, ring):
    """Where each part of a page leads, and its bytes; `None`: one of them nowhere."""
    found, end = [], address + size
    while address < end:
        count = min(end - address, PAGE - address % PAGE)
        try:
            found.append((tables.walk(registers, address, ring), count))
        except GuestMemoryError:
            return None
        address += count
    return found


def in_parts(found, address):
    """The same of larger pages: cut where pages of 4 KiB begin."""
    parts = []
    for start, size in found:
        done = 0
        while done < size:
            count = min(size - done, PAGE - (address + done) % PAGE)
            parts.append((start + done, count))
            done += count
        address += size
    return parts


@settings(max_examples=examples(400))
@given(
    seed=st.integers(0, TOP - 1),
    faults=st.sampled_from([0, 0, 0.01, 0.3]),
    mode=st.sampled_from(sorted(MODES)),
    start=st.sampled_from(STARTS),
    offset=st.integers(-20 * PAGE, 20 * PAGE),
    size=st.integers(1, 40 * PAGE),
    ring=st.sampled_from([0, 3]),
)
@example(1, 0, "4-level", 1 << 47, -PAGE, PAGE, 0)
@example(1, 0, "4-level", 1 << 47, -PAGE, PAGE + 1, 0)
@example(1, 0, "5-level", TOP, -PAGE, PAGE, 3)
def test_it_says_what_the_walk_says_of_each_page(seed, faults, mode, start, offset, size, ring):
    address = min(max(start + offset, 0), TOP - size)
    cr0, cr4, efer = MODES[mode]
    registers = Registers(cr0=cr0 and cr0 | WP, cr3=seed & 0xF_FFFF_F000, cr4=cr4, efer=efer)
    tables = Tables(seed, faults)
    found = pages(tables.read, registers, address, size, ring)
    expected = by_walk(tables, registers, address, size, ring)
    assert (found and in_parts(found, address)) == expected


def test_other_modes_and_what_is_not_at_hand_are_left_to_the_walk():
    for cr0, cr4, efer in OTHERS.values():
        registers = Registers(cr0=cr0, cr3=0x1000, cr4=cr4, efer=efer)
        assert pages(Tables(1, 0).read, registers, 0x40_0000, PAGE, 0) is None
    cr0, cr4, efer = MODES["4-level"]
    registers = Registers(cr0=cr0, cr3=0x1000, cr4=cr4, efer=efer)
    for missing in range(4):
        asked = []

        def read(place, size, asked=asked, missing=missing):
            asked.append(place)
            return None if len(asked) > missing else (0x2000 | P).to_bytes(8, "little")

        assert pages(read, registers, 0x40_0000, 100, 0) is None
        assert len(asked) == missing + 1
