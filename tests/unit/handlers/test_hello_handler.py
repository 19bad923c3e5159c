"""The greeting, and what a hostile guest gets instead of one."""

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import BridgePacket, OutcomeKind, Status, StatusKind
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.testing import FakeMemory, drive

NAME = 0x1000
BUFFER = 0x8000
TOP = (1 << 64) - 1


@pytest.fixture(scope="module")
def hello(load_handler):
    return load_handler("hello")


def guest(name: bytes, buffer: int = 256) -> FakeMemory:
    return FakeMemory({NAME: name.ljust(512, b"\0"), BUFFER: b"\xcc" * buffer})


def ask(value1: int = NAME, value2: int = BUFFER, value3: int = 0, method: int = 1) -> BridgePacket:
    return BridgePacket(STANDARD_MAGIC, 0x0001, method, value1, value2, value3)


def text_at(memory: FakeMemory, address: int = BUFFER) -> bytes:
    return memory[address].partition(b"\0")[0]


@pytest.mark.anyio
async def test_the_greeting_is_written_with_a_nul_and_its_length_answered(hello, anyio_backend):
    memory = guest(b"World")
    outcome = await drive(hello.Hello(), ask(), memory)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.output == "Hello, World!"
    assert outcome.response.values == (
        Status(1).encode(),
        13,
        STANDARD_VERIFY_VALUE3,
        STANDARD_VERIFY_VALUE4,
    )
    assert memory[BUFFER] == b"Hello, World!\0" + b"\xcc" * 242


@pytest.mark.anyio
@pytest.mark.parametrize("method", [0, 1, 0x0102, 0xFFFF])
async def test_every_method_greets_and_its_low_byte_is_the_stage(hello, anyio_backend, method):
    outcome = await drive(hello.Hello(), ask(method=method), guest(b"World"))
    assert outcome.response.value1 == Status(method & 0xFF).encode()


@pytest.mark.anyio
async def test_without_a_buffer_only_the_length_is_answered(hello, anyio_backend):
    memory = guest(b"World")
    outcome = await drive(hello.Hello(), ask(value2=0, value3=3), memory)
    assert outcome.response.values[:2] == (Status(1).encode(), 13)
    assert outcome.output == "Hello, World!"
    assert memory[BUFFER] == b"\xcc" * 256


@pytest.mark.anyio
async def test_a_name_in_utf8_is_counted_in_bytes(hello, anyio_backend):
    memory = guest("Zoë 🦉".encode())
    outcome = await drive(hello.Hello(), ask(), memory)
    assert outcome.output == "Hello, Zoë 🦉!"
    assert text_at(memory) == "Hello, Zoë 🦉!".encode()
    assert outcome.response.value2 == len("Hello, Zoë 🦉!".encode())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("capacity", "fits"), [(13, False), (14, True), (1, False), (TOP, True), (0, True)]
)
async def test_a_greeting_is_written_only_where_its_nul_fits_too(
    hello, anyio_backend, capacity, fits
):
    memory = guest(b"World")
    outcome = await drive(hello.Hello(), ask(value3=capacity), memory)
    if fits:
        assert outcome.response.values[:2] == (Status(1).encode(), 13)
        assert text_at(memory) == b"Hello, World!"
    else:
        status = Status(1, StatusKind.FAILED, native=errno.ERANGE)
        assert outcome.response.values[:2] == (status.encode(), 14)
        assert outcome.output is None
        assert memory[BUFFER] == b"\xcc" * 256


@pytest.mark.anyio
async def test_a_capacity_of_zero_stands_for_256_bytes(hello, anyio_backend):
    fitting = await drive(hello.Hello(), ask(), guest(b"a" * 247))
    assert fitting.response.values[:2] == (Status(1).encode(), 255)
    longer = await drive(hello.Hello(), ask(), guest(b"a" * 248))
    status = Status(1, StatusKind.FAILED, native=errno.ERANGE)
    assert longer.response.values[:2] == (status.encode(), 257)


@pytest.mark.anyio
async def test_a_name_may_have_256_bytes_and_no_more(hello, anyio_backend):
    longest = await drive(hello.Hello(), ask(value2=0), guest(b"a" * 256))
    assert longest.response.values[:2] == (Status(1).encode(), 264)
    too_long = await drive(hello.Hello(), ask(value2=0), guest(b"a" * 257))
    assert too_long.response.value1 == Status(1, StatusKind.INVALID_PARAMETERS).encode()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("packet", "name"),
    [
        pytest.param(ask(), b"", id="empty name"),
        pytest.param(ask(), b"\xff\xfe", id="not UTF-8"),
        pytest.param(ask(), b"\xed\xa0\x80", id="a lone surrogate"),
        pytest.param(ask(value1=0), b"World", id="null name"),
        pytest.param(ask(value1=TOP), b"World", id="name at the end of memory"),
        pytest.param(ask(value1=0xDEAD_0000), b"World", id="name not mapped"),
        pytest.param(ask(value2=0xDEAD_0000), b"World", id="buffer not mapped"),
        pytest.param(ask(value2=TOP), b"World", id="buffer at the end of memory"),
        pytest.param(ask(value2=BUFFER + 250), b"World", id="buffer cut off"),
    ],
)
async def test_a_hostile_request_is_answered_as_invalid(hello, anyio_backend, packet, name):
    memory = guest(name)
    outcome = await drive(hello.Hello(), packet, memory)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response.values[:2] == (
        Status(1, StatusKind.INVALID_PARAMETERS).encode(),
        0,
    )
    assert outcome.output is None
    assert memory[BUFFER] == b"\xcc" * 256


@pytest.mark.anyio
async def test_a_name_without_end_at_the_border_of_memory_is_invalid(hello, anyio_backend):
    border = NAME + 4096 - 256
    memory = FakeMemory({border: b"a" * 256})
    outcome = await drive(hello.Hello(), ask(value1=border, value2=0), memory)
    assert outcome.response.value1 == Status(1, StatusKind.INVALID_PARAMETERS).encode()


@pytest.mark.anyio
@given(
    raw=st.binary(max_size=300), value2=st.sampled_from([0, BUFFER, 1]), value3=st.integers(0, TOP)
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_the_guest_sends_it_gets_an_answer(
    hello, anyio_backend, raw, value2, value3
):
    outcome = await drive(hello.Hello(), ask(value2=value2, value3=value3), guest(raw, 512))
    assert outcome.kind is OutcomeKind.HANDLED
    kind = Status.decode(outcome.response.value1).kind
    assert (kind == StatusKind.SUCCESS) == (outcome.output is not None)
