"""Guest memory as a handler sees it: by virtual and physical addresses, with rights and bounds."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from paged_memory import (
    BEHIND,
    BY_VIRTUAL,
    FIRST,
    FRAMES,
    LMA,
    PAE,
    PAGE,
    PATTERN,
    PG,
    SECOND,
    THIRD,
    TOP,
    WP,
    P,
    U,
    W,
    by_either,
    event_of,
    finish,
    laws,
    paged,
    refused,
    unpaged,
)

from vmibridge.bridge.context import BridgeContext
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend
from vmibridge.vm.memory import MAX_ACCESS
from vmibridge.vm.trap import Registers

by_virtual = pytest.mark.parametrize("access", BY_VIRTUAL.values(), ids=BY_VIRTUAL)


# --- reading and writing ------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        pytest.param(0, 16, id="at the start of a page"),
        pytest.param(0x7F1, 100, id="within a page"),
        pytest.param(0, PAGE, id="a whole page"),
        pytest.param(PAGE - 1, 1, id="the last byte of a page"),
        pytest.param(PAGE - 1, 2, id="a byte of each of two pages"),
        pytest.param(PAGE - 8, PAGE + 16, id="parts of three pages"),
        pytest.param(0, 3 * PAGE, id="three whole pages"),
    ],
)
async def test_pages_that_are_physically_apart_are_one_range_to_the_guest(offset, size):
    vmi, vm = paged()
    data = PATTERN[:size]
    await vmi.memory.write(FIRST + offset, data)
    assert await vmi.memory.read(FIRST + offset, size) == data
    physical = b"".join(vm.memory[FRAMES[page]] for page in (FIRST, SECOND, THIRD))
    assert physical == bytes(offset) + data + bytes(3 * PAGE - offset - size)


@laws
@given(st.data())
def test_what_was_written_is_read_back_and_nothing_else_changed(data):
    start = data.draw(st.integers(0, 3 * PAGE))
    size = data.draw(st.integers(0, 3 * PAGE - start))
    vmi, vm = paged(dict.fromkeys(FRAMES.values(), b"\xaa" * PAGE))
    finish(vmi.memory.write(FIRST + start, PATTERN[:size]))
    assert finish(vmi.memory.read(FIRST, 3 * PAGE)) == (
        b"\xaa" * start + PATTERN[:size] + b"\xaa" * (3 * PAGE - start - size)
    )
    assert sum(len(region) for region in vm.memory.regions.values()) == 7 * PAGE


@pytest.mark.anyio
async def test_one_frame_may_stand_at_two_addresses():
    vmi, _ = paged(pages={SECOND: FRAMES[FIRST] | P | W})
    await vmi.memory.write(FIRST + 0x10, b"shared")
    assert await vmi.memory.read(SECOND + 0x10, 6) == b"shared"


@pytest.mark.anyio
async def test_without_paging_an_address_is_physical():
    vmi, vm = unpaged({0x7000: b"hello, guest"})
    assert await vmi.memory.read(0x7007, 5) == b"guest"
    await vmi.memory.write(0x7000, b"HELLO")
    assert vm.memory[0x7000] == b"HELLO, guest"


@pytest.mark.anyio
async def test_no_bytes_are_no_access():
    vmi, vm = paged()
    before = {start: bytes(region) for start, region in vm.memory.regions.items()}
    for address in (FIRST, BEHIND, 0, TOP - 1):
        assert await vmi.memory.read(address, 0) == b""
        assert await vmi.memory.read_string(address, 0) == ""
        assert await vmi.memory.read_utf16(address, 0) == ""
        assert await vmi.memory.read_physical(address, 0) == b""
        await vmi.memory.write(address, b"")
        await vmi.memory.write_physical(address, b"")
    assert before == {start: bytes(region) for start, region in vm.memory.regions.items()}


@pytest.mark.anyio
async def test_physical_memory_is_reached_past_the_page_tables():
    vmi, vm = paged(ring=3)
    await vmi.memory.write_physical(FRAMES[SECOND] + 4, b"physical")
    assert await vmi.memory.read(SECOND + 4, 8) == b"physical"
    assert await vmi.memory.read_physical(FRAMES[SECOND] + 4, 8) == b"physical"
    assert vm.memory[FRAMES[FIRST]] == bytes(PAGE)


# --- what cannot be reached ---------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("address", "size", "named"),
    [
        pytest.param(BEHIND, 1, BEHIND, id="the first byte"),
        pytest.param(BEHIND + 0x123, 4, BEHIND + 0x123, id="within a page"),
        pytest.param(THIRD + 0xFF0, 0x20, BEHIND, id="a later page"),
        pytest.param(FIRST - 1, 2, FIRST - 1, id="the byte before"),
        pytest.param(0, 1, 0, id="a null pointer"),
    ],
)
async def test_an_error_names_the_first_address_that_is_not_mapped(address, size, named):
    vmi, _ = paged()
    with refused(named, "not mapped"):
        await vmi.memory.read(address, size)
    with refused(named, "not mapped"):
        await vmi.memory.write(address, bytes(size))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({SECOND: 0}, "not mapped", id="not mapped"),
        pytest.param({SECOND: FRAMES[SECOND] | P | U}, "a read-only page", id="read-only"),
        pytest.param({SECOND: 0x70_0000 | P | W | U}, "not mapped", id="mapped to no memory"),
    ],
)
@pytest.mark.parametrize("size", [0x20, PAGE + 0x20], ids=["two pages", "three pages"])
async def test_nothing_is_written_unless_all_of_it_can_be(change, reason, size):
    vmi, vm = paged(pages=change)
    with refused(SECOND, reason):
        await vmi.memory.write(FIRST + 0xFF0, b"x" * size)
    for frame in FRAMES.values():
        assert vm.memory[frame] == bytes(PAGE)


@pytest.mark.anyio
@by_virtual
async def test_a_page_that_is_mapped_to_no_memory_is_named_by_its_virtual_address(access):
    # The space that the caller used: the physical address would mean nothing to it.
    vmi, _ = paged(pages={THIRD: 0x70_0000 | P | W | U})
    with refused(THIRD + 8, "not mapped"):
        await access(vmi.memory, THIRD + 8)
    with refused(THIRD, "not mapped"):
        await vmi.memory.read(SECOND, 2 * PAGE)


@pytest.mark.anyio
async def test_a_physical_address_is_named_as_such():
    vmi, _ = paged()
    with refused(0x70_0008, "not mapped"):
        await vmi.memory.read_physical(0x70_0008, 4)
    with refused(0x70_0008, "not mapped"):
        await vmi.memory.write_physical(0x70_0008, b"four")


@pytest.mark.anyio
@by_virtual
async def test_a_page_table_that_is_not_in_memory_is_said_to_be_so(access):
    registers = Registers(cr0=PG, cr3=0x7000_0000, cr4=PAE, efer=LMA)
    vmi = BridgeContext(event_of(registers), FakeBackend())
    with refused(FIRST, "its page table is not in memory"):
        await access(vmi.memory, FIRST)


@pytest.mark.anyio
@by_virtual
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (0x0000_8000_0000_0000, "not canonical"),
        (0xFFFF_7FFF_FFFF_FFFF, "not canonical"),
        (0xDEAD_BEEF_DEAD_BEEF, "not canonical"),
        (TOP - 1, "not mapped"),
    ],
)
async def test_any_64_bits_may_come_as_an_address(address, reason, access):
    vmi, _ = paged()
    with refused(address, reason):
        await access(vmi.memory, address)


@pytest.mark.anyio
@by_either
async def test_an_address_beyond_64_bits_is_refused(access):
    for vmi, _ in (paged(), unpaged({0: bytes(PAGE)})):
        for address in (-1, -PAGE, TOP, TOP + FIRST, 1 << 200):
            with refused(address, "beyond 64 bits"):
                await access(vmi.memory, address)


@pytest.mark.anyio
async def test_a_range_does_not_wrap_around_the_end_of_the_address_space():
    vmi, _ = unpaged({0: bytes(PAGE), TOP - PAGE: bytes(PAGE)})
    memory = vmi.memory
    assert await memory.read(TOP - 4, 4) == bytes(4)
    await memory.write(TOP - 4, b"last")
    assert await memory.read_physical(TOP - 4, 4) == b"last"
    with refused(TOP - 4, "beyond 64 bits"):
        await memory.read(TOP - 4, 5)
    with refused(TOP - 4, "beyond 64 bits"):
        await memory.write(TOP - 4, b"fives")
    with refused(TOP - 4, "beyond 64 bits"):
        await memory.read_physical(TOP - 4, 5)
    with refused(TOP - 4, "beyond 64 bits"):
        await memory.write_physical(TOP - 4, b"fives")


# --- rights -------------------------------------------------------------------------

SUPERVISOR = {SECOND: FRAMES[SECOND] | P | W}


@pytest.mark.anyio
@by_virtual
async def test_a_user_process_cannot_have_the_kernels_memory_read_or_written(access):
    vmi, vm = paged({FRAMES[SECOND]: b"secret"}, pages=SUPERVISOR, ring=3)
    with refused(SECOND, "supervisor page, asked for in ring 3"):
        await access(vmi.memory, SECOND)
    assert vm.memory[FRAMES[SECOND]].startswith(b"secret")


@pytest.mark.anyio
async def test_not_by_a_range_that_begins_in_its_own_memory_either():
    vmi, vm = paged({FRAMES[SECOND]: b"secret"}, pages=SUPERVISOR, ring=3)
    with refused(SECOND, "supervisor page, asked for in ring 3"):
        await vmi.memory.read(FIRST + 0xFFF, 2)
    with refused(SECOND, "supervisor page, asked for in ring 3"):
        await vmi.memory.write(FIRST + 0xFFF, b"xx")
    assert vm.memory[FRAMES[SECOND]].startswith(b"secret")
    assert vm.memory[FRAMES[FIRST]] == bytes(PAGE)


@pytest.mark.anyio
@pytest.mark.parametrize("ring", [0, 1, 2])
async def test_the_kernel_can(ring):
    vmi, _ = paged({FRAMES[SECOND]: b"secret"}, pages=SUPERVISOR, ring=ring)
    assert await vmi.memory.read(SECOND, 6) == b"secret"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("ring", "cr0", "allowed"),
    [(0, PG | WP, False), (0, PG, True), (3, PG | WP, False), (3, PG, False)],
)
async def test_a_read_only_page_is_written_as_the_guest_itself_could(ring, cr0, allowed):
    vmi, vm = paged(pages={FIRST: FRAMES[FIRST] | P | U}, ring=ring, cr0=cr0)
    assert await vmi.memory.read(FIRST, 4) == bytes(4)
    if allowed:
        await vmi.memory.write(FIRST, b"data")
    else:
        with refused(FIRST, "a read-only page"):
            await vmi.memory.write(FIRST, b"data")
    assert vm.memory[FRAMES[FIRST]].startswith(b"data") is allowed


# --- bounds -------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "access",
    [
        lambda memory, size: memory.read(FIRST, size),
        lambda memory, size: memory.read_physical(FIRST, size),
        lambda memory, size: memory.read_string(FIRST, size),
        lambda memory, size: memory.read_utf16(FIRST, size),
    ],
    ids=["read", "read_physical", "read_string", "read_utf16"],
)
@pytest.mark.parametrize("size", [MAX_ACCESS + 2, 1 << 40, 1 << 80, -2, -MAX_ACCESS])
async def test_a_size_that_is_too_large_or_negative_is_refused(size, access):
    for vmi, _ in (paged(), unpaged({FIRST: bytes(PAGE)})):
        with refused(FIRST, "bytes asked for, 16777216 is the most"):
            await access(vmi.memory, size)


@pytest.mark.anyio
async def test_a_write_that_is_too_large_is_refused():
    vmi, vm = unpaged({0: bytes(PAGE)})
    data = b"x" * (MAX_ACCESS + 1)
    with refused(0, "16777217 bytes asked for, 16777216 is the most"):
        await vmi.memory.write(0, data)
    with refused(0, "16777217 bytes asked for, 16777216 is the most"):
        await vmi.memory.write_physical(0, data)
    assert vm.memory[0] == bytes(PAGE)


@pytest.mark.anyio
async def test_the_largest_size_is_allowed():
    vmi, _ = unpaged({0: bytes(MAX_ACCESS)})
    data = b"\xff" * MAX_ACCESS
    await vmi.memory.write(0, data)
    assert await vmi.memory.read(0, MAX_ACCESS) == data
    assert await vmi.memory.read_physical(0, MAX_ACCESS) == data


# --- hostile page tables ------------------------------------------------------------


@settings(max_examples=examples(200))
@given(
    st.lists(
        st.integers(0, 15).map(lambda frame: frame << 12) | st.integers(0, (1 << 64) - 1),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.sampled_from([P, P | W, P | W | U, P | W | U | 0x80, 0]), min_size=1, max_size=5),
    st.integers(0, 0xFFFF),
    st.sampled_from([0, 0x10, PAE, PAE | 0x1000]),
    st.sampled_from([0, LMA]),
    st.integers(0, TOP - 1) | st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 3 * PAGE),
    st.integers(0, 3),
)
def test_whatever_the_tables_hold_an_access_ends_in_bytes_or_in_an_error(
    frames, rights, cr3, cr4, efer, address, size, ring
):
    # All of memory is page tables that point into one another, to themselves, or away.
    entries = b"".join(
        struct.pack("<Q", frames[n % len(frames)] | rights[n % len(rights)]) for n in range(512)
    )
    vm = FakeBackend(memory={0: entries * 16})
    registers = Registers(cr0=PG | WP, cr3=cr3, cr4=cr4, efer=efer)
    vmi = BridgeContext(event_of(registers, ring), vm)
    for access, kind in [
        (vmi.memory.read, bytes),
        (vmi.memory.read_string, str),
        (vmi.memory.read_utf16, str),
        (lambda address, size: vmi.memory.write(address, bytes(size)), type(None)),
    ]:
        result = result_or_error(access(address, size))
        if isinstance(result, GuestMemoryError):
            assert address <= result.address <= address + size
        else:
            assert isinstance(result, kind)


def result_or_error(body):
    try:
        return finish(body)
    except GuestMemoryError as error:
        return error
