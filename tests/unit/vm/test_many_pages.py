"""Accesses that a backend does at once, and reads that it does without waiting: the same result as
page by page, in whatever way they fail, and nothing behind the end of a trap."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import examples
from msgspec import structs
from paged_memory import PAGE, PATTERN, PG, WP, P, U, W, event_of, finish, paged, refused

from vmibridge.bridge.context import BridgeContext
from vmibridge.errors import GuestMemoryError, GuestPageFaultError
from vmibridge.testing import FakeBackend
from vmibridge.vm import memory
from vmibridge.vm.many_pages import MANY, ManyAtOnce
from vmibridge.vm.read_now import ReadsNow, read_virtual
from vmibridge.vm.trap import Registers

START = 0x40_0000
PAGES = 8
FRAMES = [0x20_0000, 0x20_1000, 0x30_0000, 0x20_2000, 0x20_4000, 0x20_3000, 0x50_0000, 0x50_1000]


class AtOnce(FakeBackend):
    """A backend that does many accesses at once, and counts how often it is asked."""

    asked = 0
    before = staticmethod(lambda: None)
    """Called in each access."""

    async def read_each(self, event, places):
        self.asked += 1
        self.before()
        return [self.memory.read(address, size) for address, size in places]

    async def write_each(self, event, parts):
        self.asked += 1
        self.before()
        for address, data in parts:
            # The regions of a test are pages.
            first = PAGE - address % PAGE
            self.memory.write(address, data[:first])
            for at in range(first, len(data), PAGE):
                self.memory.write(address + at, data[at : at + PAGE])

    async def read_physical(self, event, address, size):
        self.asked += 1
        return await super().read_physical(event, address, size)


class Now(FakeBackend):
    """A backend that reads without waiting, and counts how often it was to be waited for."""

    asked = 0

    def at_hand(self, address, size):
        try:
            return self.memory.read(address, size)
        except GuestMemoryError:
            return None

    def read_now(self, event, address, size):
        return read_virtual(self.at_hand, event, address, size)

    async def read_physical(self, event, address, size):
        self.asked += 1
        return await super().read_physical(event, address, size)


@pytest.fixture
def large(monkeypatch):
    """Each access is a large one."""
    monkeypatch.setattr(memory, "MANY", 0)


def guest(backend, entries, ring=0, cr0=PG | WP, missing=()):
    pages = {START + PAGE * number: entry for number, entry in enumerate(entries)}
    vmi, vm = paged(pages=pages, ring=ring, cr0=cr0, backend=backend)
    for number, frame in enumerate(FRAMES):
        if number not in missing:
            vm.memory.regions[frame] = bytearray([number]) * PAGE
    return vmi, vm


ALL = [frame | P | W | U for frame in FRAMES]


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 5 * PAGE + 7, PAGES * PAGE])
@pytest.mark.parametrize("offset", [0, 5])
def test_it_reads_and_writes_what_it_would_page_by_page(large, size, offset):
    size = min(size, PAGES * PAGE - offset)
    one, other, third = guest(FakeBackend, ALL), guest(AtOnce, ALL), guest(Now, ALL)
    for vmi, _ in (one, other, third):
        finish(vmi.memory.check_writable(START + offset, size))
        finish(vmi.memory.write(START + offset, (PATTERN * 3)[:size]))
        assert finish(vmi.memory.read(START + offset, size)) == (PATTERN * 3)[:size]
    assert one[1].memory.regions == other[1].memory.regions == third[1].memory.regions


def test_what_is_at_hand_is_not_waited_for():
    vmi, vm = guest(Now, ALL)
    for address, size in ((START, 1), (START + 5, 5 * PAGE + 7), (START, PAGES * PAGE)):
        whole = b"".join(bytes([number]) * PAGE for number in range(PAGES))
        start = address - START
        assert finish(vmi.memory.read(address, size)) == whole[start : start + size]
    vm.memory.write(FRAMES[1], b"text\0")
    assert finish(vmi.memory.read_string(START + PAGE)) == "text"
    assert finish(vmi.memory.read(START, 0)) == b""
    assert vm.asked == 0
    vmi.close()
    with refused(START, "the trap is answered"):
        finish(vmi.memory.read(START, 1))


def test_page_tables_count_as_they_are_at_each_read(large):
    vmi, vm = guest(Now, ALL)
    assert finish(vmi.memory.read(START, PAGES * PAGE))[:1] == b"\0"
    _, other = guest(Now, [*ALL[1:], ALL[0]])
    vm.memory.regions[0x10_0000] = other.memory.regions[0x10_0000]
    assert finish(vmi.memory.read(START, PAGES * PAGE))[:1] == b"\1"


def test_it_asks_a_few_times_and_not_for_each_page(large):
    vmi, vm = guest(AtOnce, ALL)
    finish(vmi.memory.read(START, PAGES * PAGE))
    # Four levels of page tables, and the pages.
    assert vm.asked == 5
    vm.asked = 0
    finish(vmi.memory.check_writable(START, PAGES * PAGE))
    finish(vmi.memory.write(START + 10, bytes(PAGES * PAGE - 10)))
    assert vm.asked == 4 + 1 + 1


def test_a_small_access_and_a_backend_that_cannot_are_as_before():
    vmi, vm = guest(AtOnce, ALL)
    finish(vmi.memory.read(START, 4 * PAGE))
    assert vm.asked == 4 * 5
    assert MANY == 4 * PAGE
    assert not isinstance(FakeBackend(), ManyAtOnce)
    assert not isinstance(FakeBackend(), ReadsNow)


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rights=st.lists(
        st.sampled_from([P | W | U, P | W | U, P | W | U, P | U, P | W, 0]),
        min_size=PAGES,
        max_size=PAGES,
    ),
    missing=st.sets(st.integers(0, PAGES - 1), max_size=2),
    ring=st.sampled_from([0, 3]),
    cr0=st.sampled_from([PG, PG | WP]),
    offset=st.integers(0, PAGES * PAGE),
    size=st.integers(0, PAGES * PAGE + 10),
    how=st.sampled_from(["read", "write", "check_writable", "check and write"]),
)
def test_it_fails_where_it_would_page_by_page(large, rights, missing, ring, cr0, offset, size, how):
    entries = [frame | right for frame, right in zip(FRAMES, rights, strict=True)]
    told = []
    for backend in (FakeBackend, AtOnce, Now):
        vmi, vm = guest(backend, entries, ring, cr0, missing)
        address, found = START + offset, None
        try:
            if how == "read":
                found = finish(vmi.memory.read(address, size))
            if how.startswith("check"):
                finish(vmi.memory.check_writable(address, size))
            if how.endswith("write"):
                finish(vmi.memory.write(address, (PATTERN * 4)[:size]))
        except GuestMemoryError as error:
            found = (type(error), error.address, error.reason)
        told.append((found, vm.memory.regions))
    assert told[0] == told[1] == told[2]


def test_a_page_that_is_not_present_is_named(large):
    entries = [*ALL[:5], 0, *ALL[6:]]
    vmi, _ = guest(AtOnce, entries)
    for access in (
        lambda: vmi.memory.read(START, PAGES * PAGE),
        lambda: vmi.memory.check_writable(START + 3, PAGES * PAGE - 3),
        lambda: vmi.memory.write(START, bytes(PAGES * PAGE)),
    ):
        # The guest is asked to touch it.
        with pytest.raises(GuestPageFaultError) as told:
            finish(access())
        assert told.value.address == START + 5 * PAGE


@pytest.mark.parametrize("step", range(1, 7))
def test_an_answer_that_comes_in_between_ends_it(large, step):
    vmi, vm = guest(AtOnce, ALL)

    def answer():
        if vm.asked == step:
            vmi.close()

    vm.before = answer
    before = {start: bytes(region) for start, region in vm.memory.regions.items()}
    with refused(START, "the trap is answered"):
        finish(vmi.memory.write(START, bytes(PAGES * PAGE)))
        finish(vmi.memory.read(START, 1))
    if step < 6:
        assert before == {start: bytes(region) for start, region in vm.memory.regions.items()}


def test_what_was_translated_in_one_trap_does_not_count_in_the_next(large):
    vmi, vm = guest(AtOnce, ALL)
    finish(vmi.memory.check_writable(START, PAGES * PAGE))
    vmi.park()
    # The guest has mapped other memory there, by page tables of its own.
    other = {START + PAGE * number: ALL[number ^ 1] for number in range(PAGES)}
    _, tables = paged(pages=other)
    vm.memory.regions[0x10_0000] = tables.memory.regions[0x10_0000]
    vmi.attach(structs.replace(vmi.event, seq=2))
    finish(vmi.memory.write(START, (PATTERN * 3)[: PAGES * PAGE]))
    found = vm.memory.regions[FRAMES[1]] + vm.memory.regions[FRAMES[0]]
    assert found == PATTERN[: 2 * PAGE]


def test_without_paging_it_is_one_piece(large):
    vm = AtOnce(memory={START: bytes(PAGES * PAGE)})
    vmi = BridgeContext(event_of(Registers()), vm)
    finish(vmi.memory.write(START, (PATTERN * 3)[: PAGES * PAGE]))
    assert vm.memory[START] == (PATTERN * 3)[: PAGES * PAGE]
    assert finish(vmi.memory.read(START + 1, 5 * PAGE)) == (PATTERN * 3)[1 : 5 * PAGE + 1]
