"""What handlers give guest memory for bytes and numbers: what goes on to a backend is exact.

A peer and a recording check what they get: one address of another type would cost a connection.
"""

from array import array
from enum import IntEnum

import pytest
from paged_memory import unpaged

from vmibridge.bridge.parameters import Room
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import MAX_ACCESS

pytestmark = pytest.mark.anyio

AT = 0x2000


class Place(IntEnum):
    FIRST = AT


class Sneaky:
    def __index__(self):
        raise SystemExit(3)


class Kept:
    """Memory that keeps what it is asked for."""

    def __init__(self, vm):
        self.vm, self.asked = vm, []

    async def read_physical(self, event, address, size):
        self.asked.append((address, size))
        return await self.vm.read_physical(event, address, size)

    async def write_physical(self, event, address, data):
        self.asked.append((address, data))
        await self.vm.write_physical(event, address, data)


@pytest.fixture
def opened():
    vmi, vm = unpaged({AT: bytes(32)})
    vmi._physical = kept = Kept(vm)
    return vmi.memory, kept


WRITES = ["write", "write_physical"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("data", "written"),
    [
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        # Of 2 numbers, and 8 bytes.
        (memoryview(array("I", [1, 2])), bytes((1, 0, 0, 0, 2, 0, 0, 0))),
        (array("I", [1, 2]), bytes((1, 0, 0, 0, 2, 0, 0, 0))),
        (memoryview(b"abcdef")[::2], b"ace"),
        (type("Own", (bytes,), {"__len__": lambda _: 1})(b"ab"), b"ab"),
    ],
)
async def test_whatever_has_a_buffer_is_written_as_its_bytes(opened, write, data, written):
    memory, kept = opened
    await getattr(memory, write)(AT, data)
    assert kept.asked[-1] == (AT, written)
    assert type(kept.asked[-1][1]) is bytes


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("data", ["text", [1, 2], 5, None])
async def test_what_has_none_is_not_written(opened, write, data):
    memory, kept = opened
    with pytest.raises(TypeError, match=f"^guest memory takes bytes, not {type(data).__name__}$"):
        await getattr(memory, write)(AT, data)
    assert kept.asked == []


async def test_the_limit_is_on_the_bytes_of_a_buffer(opened):
    memory, _ = opened
    numbers = memoryview(bytes(MAX_ACCESS + 8)).cast("Q")
    with pytest.raises(GuestMemoryError, match=f"{MAX_ACCESS + 8} bytes asked for"):
        await memory.write_physical(AT, numbers)


async def test_whole_numbers_of_any_type_are_numbers(opened):
    memory, kept = opened
    await memory.read_physical(Place.FIRST, True)
    await memory.read(Place.FIRST, True)
    await memory.write(Place.FIRST, b"a")
    assert [[type(part) for part in each] for each in kept.asked] == [[int, int]] * 2 + [
        [int, bytes]
    ]


@pytest.mark.parametrize("wrong", [float(AT), "0x2000", None, Sneaky()])
@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda memory, wrong: memory.read(wrong, 1), "an address"),
        (lambda memory, wrong: memory.read(AT, wrong), "a size"),
        (lambda memory, wrong: memory.read_physical(wrong, 1), "an address"),
        (lambda memory, wrong: memory.read_physical(AT, wrong), "a size"),
        (lambda memory, wrong: memory.write(wrong, b"x"), "an address"),
        (lambda memory, wrong: memory.write_physical(wrong, b"x"), "an address"),
        (lambda memory, wrong: memory.check_writable(AT, wrong), "a size"),
        (lambda memory, wrong: memory.read_string(wrong), "an address"),
        (lambda memory, wrong: memory.read_string(AT, wrong), "a limit"),
    ],
)
async def test_what_is_no_whole_number_is_refused_before_anything_is_asked_for(
    opened, ask, name, wrong
):
    memory, kept = opened
    if isinstance(wrong, Sneaky):
        with pytest.raises(SystemExit):
            await ask(memory, wrong)
    else:
        with pytest.raises(TypeError, match=f"^{name} is a whole number, not of type"):
            await ask(memory, wrong)
    assert kept.asked == []


async def test_a_room_counts_bytes_and_not_what_a_buffer_has(opened):
    memory, kept = opened
    room = Room(memory, AT, 4)
    with pytest.raises(ValueError, match="8 bytes at 0 do not fit into a room of 4"):
        await room.fill(memoryview(array("I", [1, 2])))
    assert kept.asked == []
    assert await room.fill(memoryview(array("I", [1]))) == 4
