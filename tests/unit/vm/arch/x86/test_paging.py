"""The page walk, against page tables that this module builds by itself.

The builder below knows paging from Intel SDM volume 3, chapter 4, and shares nothing
with the code under test: bits are written out where they are used.
"""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.errors import GuestMemoryError
from vmibridge.vm.arch.x86.paging import Page, walk
from vmibridge.vm.trap import Registers

laws = settings(max_examples=examples(300))
u64 = st.integers(0, (1 << 64) - 1)

P, W, U, PS = 0x01, 0x02, 0x04, 0x80
PG = 0x8000_0000  # CR0.PG
WP = 0x0001_0000  # CR0.WP
PSE, PAE, LA57 = 0x10, 0x20, 0x1000  # CR4
LMA = 0x400  # EFER

K4, M2, M4, G1 = 12, 21, 22, 30  # a page's size, as a number of address bits


class Mode(NamedTuple):
    """How one mode of paging splits an address, top level first."""

    cr4: int
    efer: int
    levels: tuple[tuple[int, int], ...]
    """Lowest address bit and number of bits of each level's index."""
    entry_size: int


MODES = {
    "32-bit": Mode(PSE, 0, ((22, 10), (12, 10)), 4),
    "PAE": Mode(PAE, 0, ((30, 2), (21, 9), (12, 9)), 8),
    "4-level": Mode(PAE, LMA, ((39, 9), (30, 9), (21, 9), (12, 9)), 8),
    "5-level": Mode(PAE | LA57, LMA, ((48, 9), (39, 9), (30, 9), (21, 9), (12, 9)), 8),
}

# Every kind of page that the guest's MMU has, with an address of its own for each.
PAGES = [
    pytest.param("32-bit", K4, 0xC012_3000, 0x8765_4000, id="32-bit, 4 KiB"),
    pytest.param("32-bit", M4, 0xC040_0000, 0x8740_0000, id="32-bit, 4 MiB"),
    pytest.param("32-bit", M4, 0xFFC0_0000, 0xAB_0040_0000, id="32-bit, 4 MiB by PSE-36"),
    pytest.param("PAE", K4, 0xC012_3000, 0xF_8765_4000, id="PAE, 4 KiB"),
    pytest.param("PAE", M2, 0x7FE0_0000, 0xF_8760_0000, id="PAE, 2 MiB"),
    pytest.param("4-level", K4, 0xFFFF_8123_4567_8000, 0xF_EDCB_A987_6000, id="4-level, 4 KiB"),
    pytest.param("4-level", M2, 0x7FFF_FFE0_0000, 0xF_EDCB_A980_0000, id="4-level, 2 MiB"),
    pytest.param("4-level", G1, 0x0000_0040_0000_0000, 0xF_EDCB_8000_0000, id="4-level, 1 GiB"),
    pytest.param("5-level", K4, 0xFF01_8123_4567_8000, 0xF_EDCB_A987_6000, id="5-level, 4 KiB"),
    pytest.param("5-level", M2, 0x00FF_FFFF_FFE0_0000, 0xF_EDCB_A980_0000, id="5-level, 2 MiB"),
    pytest.param("5-level", G1, 0xFFFF_FFFF_C000_0000, 0xF_EDCB_8000_0000, id="5-level, 1 GiB"),
]
every_page = pytest.mark.parametrize(("mode", "size", "virtual", "physical"), PAGES)


class Tables:
    """Page tables in a physical memory that holds nothing else."""

    def __init__(self, mode: str, first_table: int = 0x0012_3000) -> None:
        self.mode = MODES[mode]
        # The pointers of PAE are aligned to 32 bytes, other tables to 4 KiB.
        self.root = first_table + (0x5A0 if mode == "PAE" else 0)
        self.next_table = first_table + 0x1000
        self.entries: dict[int, int] = {}
        self.reads: list[tuple[int, int]] = []
        self.registers = Registers(
            cr0=PG | WP, cr3=self.root, cr4=self.mode.cr4, efer=self.mode.efer
        )

    def place(self, table: int, level: int, virtual: int) -> int:
        low, bits = self.mode.levels[level]
        return table + self.mode.entry_size * (virtual >> low & (1 << bits) - 1)

    def map(self, virtual: int, physical: int, size: int, rights: int = P | W | U) -> list[int]:
        """Map one page; returns where its entries are, top level first."""
        places = []
        table = self.root
        for level, (low, _) in enumerate(self.mode.levels):
            place = self.place(table, level, virtual)
            places.append(place)
            if low == size:
                self.entries[place] = leaf(physical, size) | rights
                return places
            if place not in self.entries:
                pointer = self.next_table
                self.next_table += 0x1000
                # PAE's four pointers have no rights: those bits are reserved there.
                self.entries[place] = pointer | (P if low == 30 and self.is_pae else P | W | U)
            table = self.entries[place] & 0x000F_FFFF_FFFF_F000
        raise AssertionError("no level has pages of this size")

    @property
    def is_pae(self) -> bool:
        return self.mode is MODES["PAE"]

    def with_rights(self, places: list[int]) -> list[int]:
        """The entries of a mapping that say who may do what: all but PAE's pointers."""
        return places[1:] if self.is_pae else places

    def translate(self, address: int, *, registers: Registers | None = None, **access) -> Page:
        steps = walk(registers or self.registers, address, **access)
        self.reads = []
        try:
            asked = next(steps)
            while True:
                self.reads.append(asked)
                assert len(self.reads) <= 6
                asked = steps.send(self.entries.get(asked[0], 0))
        except StopIteration as end:
            return end.value


def leaf(physical: int, size: int) -> int:
    if size == K4:
        return physical
    if size == M4:
        return physical & 0xFFC0_0000 | physical >> 32 << 13 | PS
    return physical | PS


def built(mode: str, size: int, virtual: int, physical: int, **more) -> tuple[Tables, list[int]]:
    tables = Tables(mode)
    return tables, tables.map(virtual, physical, size, **more)


def refused(tables: Tables, address: int, reason: str, **access) -> None:
    with pytest.raises(GuestMemoryError, match=reason) as caught:
        tables.translate(address, **access)
    assert caught.value.address == address


# --- mapped addresses ---------------------------------------------------------------


@every_page
@pytest.mark.parametrize("ring", [0, 1, 2, 3])
@pytest.mark.parametrize("write", [False, True])
def test_a_mapped_address_leads_to_its_place_in_its_page(
    mode, size, virtual, physical, write, ring
):
    tables, _ = built(mode, size, virtual, physical)
    whole = 1 << size
    for offset in (0, 1, 0xABC, whole // 2 + 5, whole - 1):
        page = tables.translate(virtual + offset, write=write, ring=ring)
        assert page == Page(physical + offset, whole - offset)


@every_page
def test_a_walk_reads_one_entry_for_each_level(mode, size, virtual, physical):
    tables, places = built(mode, size, virtual, physical)
    tables.translate(virtual)
    assert tables.reads == [(place, tables.mode.entry_size) for place in places]


@every_page
def test_the_addresses_around_a_page_are_not_mapped_by_it(mode, size, virtual, physical):
    tables, _ = built(mode, size, virtual, physical)
    for address in (virtual - 1, virtual + (1 << size)):
        refused(tables, address, "not mapped|not canonical|beyond 32 bits")


@pytest.mark.parametrize("mode", MODES)
def test_neighbours_in_one_table_lead_to_pages_of_their_own(mode):
    tables = Tables(mode)
    for n in range(8):
        tables.map(0x40_0000 + n * 0x1000, 0x90_0000 - n * 0x3000, K4)
    for n in range(8):
        assert tables.translate(0x40_0123 + n * 0x1000) == (0x90_0123 - n * 0x3000, 0xEDD)


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_an_entry_that_are_no_address_do_not_matter(mode):
    # Accessed, dirty, global, caching and the bits that are the system's own; in an
    # 8-byte entry also protection keys and no-execute.
    tables, places = built(mode, K4, 0x40_0000, 0x90_0000)
    for place in places:
        last = place == places[-1]
        high = 0xFFF0_0000_0000_0000 if tables.mode.entry_size == 8 else 0
        tables.entries[place] |= 0xF78 | high | (PS if last else 0)
    assert tables.translate(0x40_0123) == (0x90_0123, 0xEDD)


@pytest.mark.parametrize(
    ("mode", "size"), [("32-bit", M4), ("PAE", M2), ("4-level", M2), ("4-level", G1)]
)
def test_bit_12_of_a_large_page_is_about_caching(mode, size):
    tables, places = built(mode, size, 0x4000_0000, 0x8000_0000)
    tables.entries[places[-1]] |= 1 << 12
    assert tables.translate(0x4000_1234) == (0x8000_1234, (1 << size) - 0x1234)


@pytest.mark.parametrize(
    ("mode", "noise"),
    [
        ("32-bit", 0x18),
        ("32-bit", 0xFFFF_FFFF_0000_0FFF),
        ("PAE", 0x1F),
        ("PAE", 0xFFFF_FFFF_0000_001F),
        ("4-level", 0x18),
        ("4-level", 0x8000_0000_0000_0FFF),
        ("5-level", 0x8000_0000_0000_0FFF),
    ],
)
def test_the_bits_of_cr3_that_are_no_address_do_not_matter(mode, noise):
    tables, _ = built(mode, K4, 0x40_0000, 0x90_0000)
    registers = Registers(
        cr0=PG, cr3=tables.root | noise, cr4=tables.mode.cr4, efer=tables.mode.efer
    )
    assert tables.translate(0x40_0000, registers=registers).physical == 0x90_0000


def test_without_pse_the_size_bit_of_a_32_bit_directory_means_nothing():
    tables, places = built("32-bit", K4, 0x40_0000, 0x90_0000)
    tables.entries[places[0]] |= PS
    registers = Registers(cr0=PG, cr3=tables.root)
    assert tables.translate(0x40_0000, registers=registers).physical == 0x90_0000


def test_la57_means_nothing_outside_long_mode():
    tables, _ = built("PAE", K4, 0x40_0000, 0x90_0000)
    registers = Registers(cr0=PG, cr3=tables.root, cr4=PAE | LA57)
    assert tables.translate(0x40_0000, registers=registers).physical == 0x90_0000


def test_compatibility_mode_code_uses_the_long_mode_tables():
    # The width is the code segment's; the walk goes by EFER.LMA alone.
    tables, _ = built("4-level", K4, 0xFFFF_F000, 0x90_0000)
    assert tables.translate(0xFFFF_F000).physical == 0x90_0000


@pytest.mark.parametrize("address", [0, 0x1234, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1])
@pytest.mark.parametrize("cr4", [0, PSE, PAE, PAE | LA57])
def test_without_paging_an_address_is_physical(address, cr4):
    tables = Tables("32-bit")
    registers = Registers(cr0=1, cr3=0x5000, cr4=cr4)
    for ring in (0, 3):
        page = tables.translate(address, registers=registers, write=True, ring=ring)
        assert page == Page(address, (1 << 64) - address)
    assert tables.reads == []


# --- what is not mapped -------------------------------------------------------------


@every_page
@pytest.mark.parametrize("ring", [0, 3])
def test_an_entry_that_is_not_present_maps_nothing(mode, size, virtual, physical, ring):
    tables, places = built(mode, size, virtual, physical)
    for level, place in enumerate(places):
        whole = tables.entries[place]
        # All other bits of such an entry are the system's own, a swap slot perhaps.
        tables.entries[place] = whole & ~P
        refused(tables, virtual + 0x123, "not mapped", ring=ring)
        assert len(tables.reads) == level + 1
        tables.entries[place] = whole
    assert tables.translate(virtual + 0x123).physical == physical + 0x123


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_table_maps_nothing(mode):
    refused(Tables(mode), 0, "not mapped")
    refused(Tables(mode), 0x7FFF_F000, "not mapped")


@pytest.mark.parametrize(
    ("mode", "first", "last"),
    [
        ("4-level", 0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF),
        ("5-level", 0x0100_0000_0000_0000, 0xFEFF_FFFF_FFFF_FFFF),
    ],
)
def test_the_hole_in_the_middle_of_the_address_space_is_not_canonical(mode, first, last):
    tables = Tables(mode)
    for address in (first, first + 0x1234, 0x8000_0000_0000_0000, last - 1, last):
        refused(tables, address, "not canonical")
        assert tables.reads == []
    # Right beside the hole there is only nothing mapped.
    for address in (first - 1, last + 1, 0, (1 << 64) - 1):
        refused(tables, address, "not mapped")


def test_a_fifth_level_makes_more_addresses_canonical():
    tables, _ = built("5-level", K4, 0x0000_8000_0000_0000, 0x90_0000)
    assert tables.translate(0x0000_8000_0000_0000).physical == 0x90_0000


@pytest.mark.parametrize("mode", ["32-bit", "PAE"])
@pytest.mark.parametrize("address", [1 << 32, 0x1_0000_0000 | 0x40_0000, (1 << 64) - 1])
def test_outside_long_mode_an_address_has_32_bits(mode, address):
    tables, _ = built(mode, K4, 0x40_0000, 0x90_0000)
    refused(tables, address, "beyond 32 bits")
    assert tables.reads == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("address", [-1, -0x1000, 1 << 64, 1 << 80])
def test_what_is_no_address_at_all_is_refused(mode, address):
    refused(Tables(mode), address, "not canonical|beyond 32 bits")


# --- rights -------------------------------------------------------------------------


@every_page
def test_one_supervisor_entry_keeps_ring_3_out(mode, size, virtual, physical):
    tables, places = built(mode, size, virtual, physical)
    for place in tables.with_rights(places):
        whole = tables.entries[place]
        tables.entries[place] = whole & ~U
        for write in (False, True):
            refused(tables, virtual, "supervisor page", ring=3, write=write)
            for ring in (0, 1, 2):
                assert tables.translate(virtual, ring=ring, write=write).physical == physical
        tables.entries[place] = whole


@every_page
def test_one_read_only_entry_makes_the_page_read_only(mode, size, virtual, physical):
    tables, places = built(mode, size, virtual, physical)
    for place in tables.with_rights(places):
        whole = tables.entries[place]
        tables.entries[place] = whole & ~W
        for ring in (0, 1, 2, 3):
            refused(tables, virtual, "read-only page", ring=ring, write=True)
            assert tables.translate(virtual, ring=ring).physical == physical
        tables.entries[place] = whole


@every_page
def test_without_cr0_wp_only_ring_3_is_kept_from_writing(mode, size, virtual, physical):
    tables, _ = built(mode, size, virtual, physical, rights=P | U)
    registers = Registers(cr0=PG, cr3=tables.root, cr4=tables.mode.cr4, efer=tables.mode.efer)
    for ring in (0, 1, 2):
        page = tables.translate(virtual, registers=registers, ring=ring, write=True)
        assert page.physical == physical
    refused(tables, virtual, "read-only page", registers=registers, ring=3, write=True)


@pytest.mark.parametrize("size", [K4, M2])
def test_the_four_pointers_of_pae_carry_no_rights(size):
    tables, places = built("PAE", size, 0x4000_0000, 0x8000_0000)
    assert tables.entries[places[0]] & (P | W | U) == P
    assert tables.translate(0x4000_0000, ring=3, write=True).physical == 0x8000_0000


# --- hostile tables -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("address", [0, 0x1234_5678, 0x7FFF_FFFF])
def test_a_table_that_points_to_itself_ends_after_its_levels(mode, address):
    # As a system maps its own tables on purpose: each level reads the same table.
    levels = MODES[mode].levels
    tables = Tables(mode)
    table = tables.root & ~0xFFF
    tables.entries = dict.fromkeys(range(table, table + 0x1000), table | P | W | U)
    page = tables.translate(address)
    assert page == Page(table | address & 0xFFF, 0x1000 - (address & 0xFFF))
    assert len(tables.reads) == len(levels)


@laws
@given(
    st.sampled_from([0, PG]),
    u64,
    u64,
    st.sampled_from([0, PSE, PAE, PSE | PAE, PAE | LA57, LA57]) | u64,
    st.sampled_from([0, LMA]) | u64,
    u64
    | st.integers(0, (1 << 32) - 1)
    | st.integers(-(1 << 47), (1 << 47) - 1).map(lambda address: address & (1 << 64) - 1),
    st.lists(u64 | u64.map(lambda entry: entry | P), min_size=1, max_size=6),
    st.integers(0, 3),
    st.booleans(),
)
def test_any_registers_and_any_memory_end_in_a_page_or_in_an_error(
    paging, cr0, cr3, cr4, efer, address, entries, ring, write
):
    registers = Registers(cr0=cr0 & ~PG | paging, cr3=cr3, cr4=cr4, efer=efer)
    result = result_or_error(walk(registers, address, write=write, ring=ring), entries)
    if isinstance(result, GuestMemoryError):
        assert result.address == address
    elif not paging:
        assert result == Page(address, (1 << 64) - address)
    else:
        assert 0 <= result.physical < 1 << 52
        assert result.physical & 0xFFF == address & 0xFFF
        # The page ends where one of the page sizes ends.
        assert any(result.left == (1 << s) - address % (1 << s) for s in (K4, M2, M4, G1))


def result_or_error(steps, entries: list[int]) -> Page | GuestMemoryError:
    """How a walk ends in a memory that holds these entries, whatever it asks for."""
    reads = 0
    try:
        place, size = next(steps)
        while True:
            reads += 1
            assert reads <= 5
            # What a walk asks for is a whole entry within the physical address space.
            assert size in (4, 8)
            assert place % size == 0
            assert 0 <= place < 1 << 52
            place, size = steps.send(entries[reads % len(entries)] & (1 << 8 * size) - 1)
    except StopIteration as end:
        return end.value
    except GuestMemoryError as error:
        return error


@laws
@given(
    st.sampled_from(sorted(MODES)),
    st.dictionaries(st.integers(0, 0xFFFE), st.integers(0, 0xFFFF), min_size=1, max_size=12),
    st.integers(0, 0xFFF),
)
def test_pages_mapped_at_will_are_found_and_no_others(mode, pages, offset):
    # Far apart, so that they share some of their tables and have others of their own.
    tables = Tables(mode)
    shift = 31 if tables.mode.efer else 16
    for number, frame in pages.items():
        tables.map(number << shift, 0x1000_0000 + (frame << 12), K4)
    for number in {*pages, *(n + 1 for n in pages), 0}:
        address = (number << shift) + offset
        if number in pages:
            expected = 0x1000_0000 + (pages[number] << 12) + offset
            assert tables.translate(address).physical == expected
        else:
            refused(tables, address, "not mapped")
