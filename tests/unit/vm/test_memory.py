"""Guest memory as a handler sees it: by virtual address, bounded, for one trap."""

import struct
from contextlib import contextmanager

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from msgspec import structs

from vmibridge.bridge.context import BridgeContext
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend, FakeMemory
from vmibridge.vm.memory import MAX_ACCESS
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
by_virtual = pytest.mark.parametrize("access", BY_VIRTUAL.values(), ids=BY_VIRTUAL)
by_either = pytest.mark.parametrize(
    "access", (BY_VIRTUAL | BY_PHYSICAL).values(), ids=BY_VIRTUAL | BY_PHYSICAL
)

PATTERN = bytes(range(1, 252)) * 49  # 12,299 bytes, its period no divisor of a page


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


# --- strings ------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "limit", "text"),
    [
        pytest.param(b"hello\0world", 4096, "hello", id="ends at a NUL"),
        pytest.param(b"\0hello", 4096, "", id="may be empty"),
        pytest.param(b"hello\0world", 5, "hello", id="ends at the limit, NUL not included"),
        pytest.param(b"hello\0world", 3, "hel", id="ends at the limit"),
        pytest.param(b"hello\0world", 6, "hello", id="ends at a NUL that the limit includes"),
        pytest.param("grüße".encode() + b"\0", 4096, "grüße", id="is UTF-8"),
        pytest.param("grüße".encode() + b"\0", 3, "gr\ufffd", id="may be cut in a character"),
        pytest.param(b"a\xff\xc3(\0", 4096, "a\ufffd\ufffd(", id="may be no text at all"),
        pytest.param(b"\xed\xa0\x80\0", 4096, "\ufffd" * 3, id="has no surrogates"),
        pytest.param(b"\xf4\x90\x80\x80\0", 4096, "\ufffd" * 4, id="ends with Unicode"),
    ],
)
async def test_a_string(raw, limit, text):
    vmi, _ = paged({FRAMES[FIRST]: raw})
    assert await vmi.memory.read_string(FIRST, limit) == text


@pytest.mark.anyio
async def test_a_string_may_have_another_encoding():
    vmi, _ = paged({FRAMES[FIRST]: "grüße".encode("cp1252") + b"\x81\0"})
    assert await vmi.memory.read_string(FIRST, encoding="cp1252") == "grüße\ufffd"


@pytest.mark.anyio
async def test_a_string_without_nul_ends_at_the_limit():
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"a" * PAGE))
    for limit in (1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE):
        assert await vmi.memory.read_string(FIRST, limit) == "a" * limit
    with refused(BEHIND, "not mapped"):
        await vmi.memory.read_string(FIRST, 3 * PAGE + 1)


@pytest.mark.anyio
async def test_a_string_has_at_most_4096_bytes_unless_the_handler_asks_for_more():
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"a" * PAGE))
    assert await vmi.memory.read_string(FIRST) == "a" * 4096
    assert await vmi.memory.read_utf16(FIRST) == "\u6161" * 2048


@pytest.mark.anyio
async def test_a_string_may_cross_pages():
    vmi, _ = paged(
        {
            FRAMES[FIRST]: b"beg".rjust(PAGE, b"#"),
            FRAMES[SECOND]: b"-" * PAGE,
            FRAMES[THIRD]: b"end\0garbage",
        }
    )
    assert await vmi.memory.read_string(SECOND - 3, 5000) == "beg" + "-" * PAGE + "end"


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["", "x", "ends right before a page that is not mapped"])
async def test_what_lies_behind_the_end_of_a_string_need_not_be_mapped(text):
    raw = text.encode() + b"\0"
    vmi, _ = paged({FRAMES[THIRD]: raw.rjust(PAGE, b"#")})
    assert await vmi.memory.read_string(BEHIND - len(raw), 4096) == text
    wide = (text + "\0").encode("utf-16-le")
    vmi, _ = paged({FRAMES[THIRD]: wide.rjust(PAGE, b"#")})
    assert await vmi.memory.read_utf16(BEHIND - len(wide), 4096) == text


@pytest.mark.anyio
async def test_what_lies_behind_the_end_of_a_string_need_not_be_memory():
    # Without paging, and in large pages, the end of memory is within one page.
    vmi, _ = unpaged({0x8000: b"last words\0".rjust(PAGE)})
    assert await vmi.memory.read_string(0x9000 - 11, 4096) == "last words"
    vmi, _ = unpaged({0x8000: "last words\0".encode("utf-16-le").rjust(PAGE)})
    assert await vmi.memory.read_utf16(0x9000 - 22, 4096) == "last words"


@pytest.mark.anyio
async def test_what_lies_behind_the_end_of_a_string_need_not_be_an_address():
    last = TOP - PAGE
    vmi, _ = paged({0x5_0000: b"last words\0".rjust(PAGE)}, pages={last: 0x5_0000 | P})
    assert await vmi.memory.read_string(TOP - 11, 4096) == "last words"
    assert await vmi.memory.read_string(TOP - 11, 4) == "last"
    # One that has no end before it is no string of the guest's.
    await vmi.memory.write_physical(0x5_0000 + PAGE - 1, b"!")
    with refused(TOP, "beyond 64 bits"):
        await vmi.memory.read_string(TOP - 11, 4096)
    assert await vmi.memory.read_string(TOP - 11, 11) == "last words!"


@laws
@given(st.binary(max_size=64), st.integers(0, 80), st.integers(0, 40))
def test_a_string_is_what_stands_before_its_first_nul(raw, limit, before):
    address = SECOND - before
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"\x00" * PAGE))
    finish(vmi.memory.write(address, raw))
    expected = (raw + bytes(80))[:limit].split(b"\0")[0]
    assert finish(vmi.memory.read_string(address, limit)) == expected.decode("utf-8", "replace")


@pytest.mark.anyio
async def test_a_c_string_is_the_bytes_before_its_nul_and_never_cut_short():
    vmi, _ = paged({FRAMES[FIRST]: b"caf\xe9\0more", FRAMES[THIRD]: b"end\0".rjust(PAGE, b"#")})
    for limit in (4, 5, 4096):
        assert await vmi.memory.read_c_string(FIRST, limit) == b"caf\xe9"
    for limit in (0, 1, 3):
        with refused(FIRST, f"no NUL within {limit} bytes"):
            await vmi.memory.read_c_string(FIRST, limit)
    assert await vmi.memory.read_c_string(BEHIND - 4, 4096) == b"end"
    assert await vmi.memory.read_c_string(FIRST + 4, 0) == b""
    with refused(BEHIND, "not mapped"):
        await vmi.memory.read_c_string(BEHIND, 0)
    with refused(FIRST, f"{MAX_ACCESS} is the most"):
        await vmi.memory.read_c_string(FIRST, MAX_ACCESS)


# --- UTF-16 -------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "limit", "text"),
    [
        pytest.param("hello\0world".encode("utf-16-le"), 4096, "hello", id="ends at a NUL"),
        pytest.param(b"\0\0h\0", 4096, "", id="may be empty"),
        pytest.param(b"h\0i\0!\0", 4, "hi", id="ends at the limit, which is in bytes"),
        pytest.param(b"h\0i\0!\0", 5, "hi", id="ends at the last whole character"),
        pytest.param(b"h\0i\0!\0", 1, "", id="has no half characters"),
        # Two zero bytes, of which one ends a character and one begins the next.
        pytest.param(b"a\0\0\1b\0\0\0", 4096, "aĀb", id="is not ended at an odd offset"),
        pytest.param(b"\1\0\0\2\0\3\0\0", 4096, "\1Ȁ\u0300", id="nor at a later one"),
        pytest.param(b"a\0\0\0\0b\0\0", 4096, "a", id="ends at the first even one"),
        pytest.param(b"=\xd8\0\xde\0\0", 4096, "\U0001f600", id="has surrogate pairs"),
        pytest.param(b"=\xd8\0\xde\0\0", 2, "\ufffd", id="may be cut in a pair"),
        pytest.param(b"a\0=\xd8b\0\0\0", 4096, "a\ufffdb", id="may have a lone high surrogate"),
        pytest.param(b"a\0\0\xdeb\0\0\0", 4096, "a\ufffdb", id="may have a lone low surrogate"),
        pytest.param(b"\xff\xfea\0\0\0", 4096, "\ufeffa", id="keeps a byte order mark"),
    ],
)
async def test_a_utf16_string(raw, limit, text):
    vmi, _ = paged({FRAMES[FIRST]: raw})
    assert await vmi.memory.read_utf16(FIRST, limit) == text


@pytest.mark.anyio
@pytest.mark.parametrize("before", range(1, 8))
async def test_a_utf16_string_may_cross_pages_at_any_byte(before):
    # Also between the two bytes of its last NUL, and of a character like U+0100.
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"#" * PAGE))
    await vmi.memory.write(SECOND - before, "aĀb\0".encode("utf-16-le"))
    assert await vmi.memory.read_utf16(SECOND - before) == "aĀb"


@laws
@given(
    st.lists(st.sampled_from([0, 1, 0x41, 0xD8, 0xDC]) | st.integers(0, 255), max_size=40),
    st.integers(0, 60),
    st.integers(0, 30),
)
def test_a_utf16_string_is_what_stands_before_its_first_nul(raw, limit, before):
    address = SECOND - before
    vmi, _ = paged()
    finish(vmi.memory.write(address, bytes(raw)))
    whole = (bytes(raw) + bytes(60))[: limit & ~1]
    units = [whole[at : at + 2] for at in range(0, len(whole), 2)]
    text = b"".join(units[: [*units, b"\0\0"].index(b"\0\0")])
    assert finish(vmi.memory.read_utf16(address, limit)) == text.decode("utf-16-le", "replace")


# --- for one trap only --------------------------------------------------------------


@pytest.mark.anyio
@by_either
async def test_after_the_answer_guest_memory_is_out_of_reach(access):
    for vmi, vm in (paged(), unpaged({FIRST: bytes(PAGE)})):
        memory = vmi.memory
        before = {start: bytes(region) for start, region in vm.memory.regions.items()}
        assert await memory.read(FIRST, 4) == bytes(4)
        vmi.close()
        with refused(FIRST, "the trap is answered: the guest runs again"):
            await access(memory, FIRST)
        assert before == {start: bytes(region) for start, region in vm.memory.regions.items()}


@pytest.mark.anyio
async def test_a_context_whose_memory_was_never_used_closes_it_too():
    vmi, _ = paged()
    vmi.close()
    with refused(FIRST, "the trap is answered"):
        await vmi.memory.read(FIRST, 0)


class Answering(FakeBackend):
    """A backend whose trap is answered during the access that `answer_at` says."""

    context: BridgeContext
    accesses = 0
    answer_at = 0

    def count(self) -> None:
        self.accesses += 1
        if self.accesses == self.answer_at:
            self.context.close()

    async def read_physical(self, event, address, size):
        self.count()
        return await super().read_physical(event, address, size)

    async def write_physical(self, event, address, data):
        self.count()
        await super().write_physical(event, address, data)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "access",
    [
        lambda memory: memory.read(FIRST, 3 * PAGE),
        lambda memory: memory.write(FIRST, bytes(3 * PAGE)),
        lambda memory: memory.read_string(FIRST, 3 * PAGE),
        lambda memory: memory.read_utf16(FIRST, 3 * PAGE),
    ],
    ids=["read", "write", "read_string", "read_utf16"],
)
async def test_an_answer_that_comes_in_between_ends_the_access(access):
    full = dict.fromkeys(FRAMES.values(), b"x" * PAGE)
    vmi, vm = paged(full, backend=Answering)
    await access(vmi.memory)
    for step in range(1, vm.accesses):
        vmi, vm = paged(full, backend=Answering)
        vm.context, vm.answer_at = vmi, step
        with pytest.raises(GuestMemoryError, match="the trap is answered"):
            await access(vmi.memory)
        assert vm.accesses == step, "reached guest memory after the answer"


# --- for one trap, and then for the next --------------------------------------------

ACCESSES = {
    "read": lambda memory: memory.read(FIRST, 3 * PAGE),
    "write": lambda memory: memory.write(FIRST, PATTERN[: 3 * PAGE]),
    "read_string": lambda memory: memory.read_string(FIRST, 3 * PAGE),
    "read_utf16": lambda memory: memory.read_utf16(FIRST, 3 * PAGE),
    "read_physical": lambda memory: memory.read_physical(0x9_0000, 4),
    "write_physical": lambda memory: memory.write_physical(0x9_0000, b"data"),
}
every_access = pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)


class Leaving(FakeBackend):
    """A backend whose trap leaves during the access that `leave_at` says."""

    context: BridgeContext
    leave_at = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seqs: list[int] = []

    def count(self, event) -> None:
        self.seqs.append(event.seq)
        if len(self.seqs) == self.leave_at:
            self.context.park()

    async def read_physical(self, event, address, size):
        self.count(event)
        return await super().read_physical(event, address, size)

    async def write_physical(self, event, address, data):
        self.count(event)
        await super().write_physical(event, address, data)


async def settle():
    for _ in range(5):
        await checkpoint()


@pytest.mark.anyio
@every_access
async def test_an_access_waits_from_the_soft_deadline_to_the_retry(access):
    vmi, vm = paged(dict.fromkeys(FRAMES.values(), b"x" * PAGE), backend=Leaving)
    vmi.park()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(access, vmi.memory)
        await settle()
        assert vm.seqs == [], "the guest runs"
        vmi.attach(structs.replace(vmi.event, seq=2))
    assert set(vm.seqs) == {2}
    assert vmi.event.seq == 2


@pytest.mark.anyio
@every_access
async def test_an_access_that_the_trap_leaves_is_done_anew_with_the_next_one(access):
    """In another address space, in the extreme: nothing that was translated is used again."""
    full = dict.fromkeys(FRAMES.values(), b"x" * PAGE)
    vmi, vm = paged(full, backend=Leaving)
    await access(vmi.memory)
    whole = len(vm.seqs)
    for step in range(1, whole):
        vmi, vm = paged(full, backend=Leaving)
        vm.context, vm.leave_at = vmi, step
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(access, vmi.memory)
            await settle()
            assert vm.seqs == [1] * step, "the guest runs"
            vmi.attach(structs.replace(vmi.event, seq=2))
        assert vm.seqs == [1] * step + [2] * whole


@pytest.mark.anyio
async def test_what_is_read_is_never_of_two_traps():
    vmi, vm = paged(dict.fromkeys(FRAMES.values(), b"x" * PAGE), backend=Leaving)
    vm.context, vm.leave_at = vmi, 5 + 5  # the second page: four steps of the walk, one read
    found = []

    async def read():
        found.append(await vmi.memory.read(FIRST, 3 * PAGE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await settle()
        for frame in FRAMES.values():
            vm.memory.write(frame, b"y" * PAGE)
        vmi.attach(structs.replace(vmi.event, seq=2))
    assert found == [b"y" * 3 * PAGE]


@pytest.mark.anyio
@every_access
async def test_an_access_that_waits_fails_when_no_trap_will_come(access):
    vmi, vm = paged(backend=Leaving)
    vmi.park()
    failed = []

    async def fail():
        with pytest.raises(GuestMemoryError, match="the trap is answered"):
            await access(vmi.memory)
        failed.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await settle()
        vmi.close()
    assert (failed, vm.seqs) == ([True], [])


@pytest.mark.anyio
async def test_it_is_settled_when_no_access_is_under_way():
    reading, read_on = anyio.Event(), anyio.Event()

    class Slow(FakeBackend):
        async def read_physical(self, event, address, size):
            reading.set()
            await read_on.wait()
            return await super().read_physical(event, address, size)

    vm = Slow(memory={0x1000: b"data"})
    vmi = BridgeContext(event_of(Registers()), vm)
    done = []

    async def settled():
        await vmi.memory.settled()
        done.append(True)

    await settled()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(vmi.memory.read, 0x1000, 4)
        await reading.wait()
        vmi.park()
        tasks.start_soon(settled)
        await settle()
        assert done == [True]
        read_on.set()
    assert done == [True, True]


def test_a_context_has_one_memory_and_tells_of_its_trap():
    event = TrapEvent(7, TrapReason.CPUID, Registers(cr3=0x5000), vm="a", vcpu=3)
    vmi = BridgeContext(event, FakeBackend())
    assert vmi.memory is vmi.memory
    assert (vmi.event, vmi.vm, vmi.vcpu) == (event, "a", 3)
    assert vmi.event.address_space == 0x5000


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


# --- memory for tests ---------------------------------------------------------------


def test_fake_memory_is_its_regions_and_the_pages_that_they_are_in():
    memory = FakeMemory({0x1010: b"one", 0x2000: b"two", 0x5FFF: b"over"})
    assert memory.read(0x1011, 2) == b"ne"
    assert memory.read(0x100F, 5) == b"\0one\0"
    assert memory.read(0x1FFE, 6) == b"\0\0two\0"
    assert memory.read(0x5FFE, 6) == b"\0over\0"
    assert memory.read(0x7000, 0) == b""
    for address, size, missing in [
        (0xFFF, 1, 0xFFF),
        (0xFFF, 2, 0xFFF),
        (0x2FFF, 2, 0x3000),
        (0x4000, 1, 0x4000),
        (0x6FFF, 2, 0x7000),
    ]:
        with refused(missing, "not mapped"):
            memory.read(address, size)


def test_fake_memory_is_written_only_where_a_region_is():
    memory = FakeMemory({0x1010: b"one", 0x1013: b"two"})
    memory.write(0x1010, b"O")
    memory.write(0x1011, b"NE")
    for address, size in [(0x100F, 1), (0x100F, 2), (0x1012, 2), (0x1016, 1), (0x3000, 1)]:
        with refused(address, "not mapped"):
            memory.write(address, bytes(size))
    assert (memory[0x1010], memory[0x1013]) == (b"ONE", b"two")
    with pytest.raises(KeyError):
        memory[0x1011]


@pytest.mark.anyio
async def test_a_handler_reads_a_string_that_its_test_wrote_down_as_it_is():
    vmi, _ = unpaged({0x1000: b"hello\0", 0x5FFA: b"across pages\0"})
    assert await vmi.memory.read_string(0x1000, limit=256) == "hello"
    assert await vmi.memory.read_string(0x5FFA, limit=256) == "across pages"
