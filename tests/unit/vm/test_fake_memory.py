"""The memory that tests of handlers use."""

import pytest
from paged_memory import refused, unpaged

from vmibridge.testing import FakeMemory

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
