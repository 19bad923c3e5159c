"""Values for the guest: only those that are listed, and never in an output."""

import errno

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import BridgePacket, OutcomeKind, Status, StatusKind
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.testing import FakeMemory, drive

NAME = 0x1000
BUFFER = 0x8000
TOP = (1 << 64) - 1
UNKNOWN = Status(1, StatusKind.FAILED, native=errno.ENOENT).encode()
TOO_SMALL = Status(1, StatusKind.FAILED, native=errno.ERANGE).encode()
INVALID = Status(1, StatusKind.INVALID_PARAMETERS).encode()


@pytest.fixture(scope="module")
def environment(load_handler):
    return load_handler("environment")


def make(environment, **fields):
    return environment.Environment(environment.Environment.Settings(**fields))


def guest(name: bytes, buffer: int = 512) -> FakeMemory:
    return FakeMemory({NAME: name.ljust(512, b"\0"), BUFFER: b"\xcc" * buffer})


def ask(value1: int = NAME, value2: int = BUFFER, value3: int = 0, method: int = 1) -> BridgePacket:
    return BridgePacket(STANDARD_MAGIC, 0x0022, method, value1, value2, value3)


def text_at(memory: FakeMemory, address: int = BUFFER) -> bytes:
    return memory[address].partition(b"\0")[0]


@pytest.mark.anyio
async def test_a_listed_value_is_written_with_a_nul(environment, anyio_backend):
    memory = guest(b"TOKEN")
    outcome = await drive(make(environment, values={"TOKEN": "s3cret"}), ask(), memory)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response.values == (
        Status(1).encode(),
        6,
        STANDARD_VERIFY_VALUE3,
        STANDARD_VERIFY_VALUE4,
    )
    assert memory[BUFFER] == b"s3cret\0" + b"\xcc" * 505


@pytest.mark.anyio
async def test_the_output_is_the_name_and_nothing_holds_the_value(environment, anyio_backend):
    handler = make(environment, values={"TOKEN": "s3cret"})
    outcome = await drive(handler, ask(), guest(b"TOKEN"))
    assert outcome.output == "TOKEN"
    assert "s3cret" not in repr(outcome)


@pytest.mark.anyio
async def test_a_listed_name_is_passed_through_from_the_process(
    environment, anyio_backend, monkeypatch
):
    monkeypatch.setenv("VMIBRIDGE_TEST", "before")
    handler = make(environment, names=["VMIBRIDGE_TEST"])
    monkeypatch.setenv("VMIBRIDGE_TEST", "after")
    memory = guest(b"VMIBRIDGE_TEST")
    outcome = await drive(handler, ask(), memory)
    assert outcome.response.value1 == Status(1).encode()
    assert text_at(memory) == b"before"


@pytest.mark.anyio
async def test_bytes_of_the_process_that_are_no_text_arrive_as_they_are(
    environment, anyio_backend, monkeypatch
):
    monkeypatch.setenv("VMIBRIDGE_TEST", "a\udcff")
    memory = guest(b"VMIBRIDGE_TEST")
    outcome = await drive(make(environment, names=["VMIBRIDGE_TEST"]), ask(), memory)
    assert outcome.response.value2 == 2
    assert text_at(memory) == b"a\xff"


@pytest.mark.anyio
async def test_a_name_that_the_host_has_but_does_not_list_is_as_unknown_as_any(
    environment, anyio_backend, monkeypatch
):
    monkeypatch.setenv("VMIBRIDGE_TEST", "hidden")
    monkeypatch.delenv("VMIBRIDGE_NONE", raising=False)
    handler = make(environment, values={"TOKEN": "s3cret"}, names=["VMIBRIDGE_NONE"])
    answers = []
    for name in (
        b"VMIBRIDGE_TEST",
        b"VMIBRIDGE_NONE",
        b"VMIBRIDGE_OTHER",
        b"",
        b"token",
        b"TOKEN=",
        b"PATH",
    ):
        memory = guest(name)
        outcome = await drive(handler, ask(), memory)
        assert outcome.output is None
        answers.append((outcome.response.values, memory[BUFFER]))
    assert set(answers) == {
        ((UNKNOWN, 0, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4), b"\xcc" * 512)
    }


@pytest.mark.anyio
async def test_by_default_nothing_is_handed_out(environment, anyio_backend, monkeypatch):
    monkeypatch.setenv("VMIBRIDGE_TEST", "hidden")
    outcome = await drive(environment.Environment(), ask(), guest(b"VMIBRIDGE_TEST"))
    assert outcome.response.value1 == UNKNOWN


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("capacity", "fits"), [(6, False), (7, True), (1, False), (TOP, True), (0, True)]
)
async def test_a_value_is_written_only_where_its_nul_fits_too(
    environment, anyio_backend, capacity, fits
):
    memory = guest(b"TOKEN")
    handler = make(environment, values={"TOKEN": "s3cret"})
    outcome = await drive(handler, ask(value3=capacity), memory)
    if fits:
        assert outcome.response.values[:2] == (Status(1).encode(), 6)
        assert text_at(memory) == b"s3cret"
    else:
        assert outcome.response.values[:2] == (TOO_SMALL, 7)
        assert outcome.output is None
        assert memory[BUFFER] == b"\xcc" * 512


@pytest.mark.anyio
@pytest.mark.parametrize(("length", "status"), [(255, Status(1).encode()), (256, TOO_SMALL)])
async def test_a_capacity_of_zero_stands_for_256_bytes(environment, anyio_backend, length, status):
    handler = make(environment, values={"LONG": "x" * length})
    outcome = await drive(handler, ask(), guest(b"LONG"))
    assert outcome.response.value1 == status


@pytest.mark.anyio
async def test_an_empty_value_is_a_value(environment, anyio_backend):
    memory = guest(b"EMPTY")
    outcome = await drive(make(environment, values={"EMPTY": ""}), ask(), memory)
    assert outcome.response.values[:2] == (Status(1).encode(), 0)
    assert memory[BUFFER][:2] == b"\0\xcc"


@pytest.mark.anyio
async def test_a_name_may_have_256_bytes_and_no_more(environment, anyio_backend):
    handler = make(environment, values={"n" * 256: "found"})
    longest = await drive(handler, ask(), guest(b"n" * 256))
    assert longest.response.values[:2] == (Status(1).encode(), 5)
    too_long = await drive(handler, ask(), guest(b"n" * 257))
    assert too_long.response.value1 == INVALID


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("packet", "name"),
    [
        pytest.param(ask(), b"\xff", id="not UTF-8"),
        pytest.param(ask(value1=0), b"TOKEN", id="null name"),
        pytest.param(ask(value1=TOP), b"TOKEN", id="name at the end of memory"),
        pytest.param(ask(value1=0xDEAD_0000), b"TOKEN", id="name not mapped"),
        pytest.param(ask(value2=0), b"TOKEN", id="null buffer"),
        pytest.param(ask(value2=TOP), b"TOKEN", id="buffer at the end of memory"),
        pytest.param(ask(value2=BUFFER + 508), b"TOKEN", id="buffer cut off"),
    ],
)
async def test_a_hostile_request_is_answered_as_invalid(environment, anyio_backend, packet, name):
    memory = guest(name)
    outcome = await drive(make(environment, values={"TOKEN": "s3cret"}), packet, memory)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response.values[:2] == (INVALID, 0)
    assert outcome.output is None
    assert memory[BUFFER] == b"\xcc" * 512


@pytest.mark.anyio
@given(raw=st.binary(max_size=300), value3=st.integers(0, TOP))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_other_name_ever_gets_the_value(environment, anyio_backend, raw, value3):
    memory = guest(raw)
    outcome = await drive(make(environment, values={"TOKEN": "s3cret"}), ask(value3=value3), memory)
    assert outcome.kind is OutcomeKind.HANDLED
    if raw.partition(b"\0")[0] != b"TOKEN":
        assert outcome.response.value1 in (UNKNOWN, INVALID)
        assert memory[BUFFER] == b"\xcc" * 512


@pytest.mark.anyio
@pytest.mark.parametrize("method", [0, 2, 0xFFFF])
async def test_an_unknown_method_is_rejected(environment, anyio_backend, method):
    outcome = await drive(make(environment), ask(method=method), guest(b"TOKEN"))
    assert outcome.kind is OutcomeKind.REJECTED


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"values": {"": "x"}}, "not empty"),
        ({"values": {"A=B": "x"}}, "neither NUL nor '='"),
        ({"names": ["A\0B"]}, "neither NUL nor '='"),
        ({"names": ["n" * 257]}, "at most 256 bytes"),
        ({"values": {"A": "x\0y"}}, "the value of 'A' holds a NUL"),
        ({"values": {"A": "x"}, "names": ["A"]}, "listed both"),
        ({"names": "PATH"}, "names"),
        ({"secrets": {}}, "secrets"),
    ],
)
def test_wrong_settings_are_refused_by_name(environment, wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, environment.Environment.Settings)


def test_a_refused_value_is_not_quoted(environment):
    with pytest.raises(ValueError, match="lone surrogate") as caught:
        environment.Environment.Settings(values={"A": "s3cret\ud800"})
    assert "s3cret" not in str(caught.value)
