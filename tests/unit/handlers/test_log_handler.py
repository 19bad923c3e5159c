"""Guest text in the host's log: levels, bounds, and lines that cannot be forged."""

import logging

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import (
    BridgePacket,
    OutcomeKind,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.testing import drive

TEXT = 0x1000
TOP = (1 << 64) - 1
LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}


@pytest.fixture(scope="module")
def log(load_handler):
    return load_handler("log")


@pytest.fixture
def records(caplog):
    caplog.set_level(logging.DEBUG, "vmibridge.guest")
    return caplog


def say(size: int, method: int = 2, address: int = TEXT) -> BridgePacket:
    return BridgePacket(STANDARD_MAGIC, 0x0021, method, address, size)


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "level"), LEVELS.items())
async def test_each_method_logs_at_its_level(log, records, anyio_backend, method, level):
    outcome = await drive(log.Log(), say(5, method), {TEXT: b"hello"})
    assert outcome.response.values == (
        Status(method).encode(),
        5,
        STANDARD_VERIFY_VALUE3,
        STANDARD_VERIFY_VALUE4,
    )
    assert outcome.output == "hello"
    assert records.record_tuples == [("vmibridge.guest", level, "vm vm vcpu 0: hello")]


@pytest.mark.anyio
async def test_a_line_names_vm_and_vcpu_also_as_attributes(log, records, anyio_backend):
    event = TrapEvent(1, TrapReason.VMCALL, Registers(), vm="web\n1", vcpu=3, length=3)
    await drive(log.Log(), say(2), {TEXT: b"up"}, event=event)
    assert records.messages == ["vm web\\n1 vcpu 3: up"]
    assert (records.records[0].vm, records.records[0].vcpu) == ("web\n1", 3)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("least", "logged"),
    [("debug", [1, 2, 3, 4]), ("info", [2, 3, 4]), ("warning", [3, 4]), ("error", [4])],
)
async def test_text_below_the_level_is_taken_but_not_logged(
    log, records, anyio_backend, least, logged
):
    handler = log.Log(log.Log.Settings(level=least))
    for method in LEVELS:
        outcome = await drive(handler, say(2, method), {TEXT: b"hi"})
        assert outcome.response.values[:2] == (Status(method).encode(), 2)
        assert outcome.output == "hi"
    assert [record.levelno for record in records.records] == [LEVELS[method] for method in logged]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "escaped"),
    [
        (b"one\ntwo", r"one\ntwo"),
        (b"one\r\ntwo", r"one\r\ntwo"),
        (b"a\0b\tc", r"a\x00b\tc"),
        (b"\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\u202egnp.exe".encode(), r"\u202egnp.exe"),
        ("\u2066x\u2069".encode(), r"\u2066x\u2069"),
        ("a\u2028b\u2029c\x85d".encode(), r"a\u2028b\u2029c\x85d"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
        (b"\xff\xfe\xc0\xaf", r"\xff\xfe\xc0\xaf"),
        ("\x9b1mC1".encode(), r"\x9b1mC1"),
        ("\U000e0041tag".encode(), r"\U000e0041tag"),
        (b"100% %s %d {0}", "100% %s %d {0}"),
        ("Grüße 🦉".encode(), "Grüße 🦉"),
        (rb"C:\new", r"C:\new"),
        (b"", ""),
    ],
)
async def test_what_is_not_printable_is_escaped(log, records, anyio_backend, raw, escaped):
    outcome = await drive(log.Log(), say(len(raw)), {TEXT: raw})
    assert outcome.response.values[:2] == (Status(2).encode(), len(raw))
    assert outcome.output == escaped
    assert records.messages == [f"vm vm vcpu 0: {escaped}"]


@pytest.mark.anyio
@given(raw=st.binary(max_size=64), method=st.sampled_from(sorted(LEVELS)))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_bytes_of_a_guest_make_a_second_line(log, records, anyio_backend, raw, method):
    records.clear()
    outcome = await drive(log.Log(), say(len(raw), method), {TEXT: raw})
    assert outcome.response.value2 == len(raw)
    assert outcome.output.isprintable()
    assert [message.isprintable() for message in records.messages] == [True]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("address", "size"),
    [
        pytest.param(TEXT, 4097, id="over the limit"),
        pytest.param(TEXT, TOP, id="endless"),
        pytest.param(TEXT + 2, 4096, id="beyond its page"),
        pytest.param(0, 4, id="null"),
        pytest.param(TOP, 4, id="around the end of memory"),
        pytest.param(0xDEAD_0000, 4, id="not mapped"),
    ],
)
async def test_text_out_of_bounds_is_invalid_and_not_logged(
    log, records, anyio_backend, address, size
):
    outcome = await drive(log.Log(), say(size, address=address), {TEXT: b"hello"})
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response.values[:2] == (Status(2, StatusKind.INVALID_PARAMETERS).encode(), 0)
    assert outcome.output is None
    assert records.messages == []


@pytest.mark.anyio
async def test_the_limit_is_a_setting(log, records, anyio_backend):
    handler = log.Log(log.Log.Settings(limit=3))
    taken = await drive(handler, say(3), {TEXT: b"abcd"})
    assert taken.output == "abc"
    refused = await drive(handler, say(4), {TEXT: b"abcd"})
    assert refused.response.value1 == Status(2, StatusKind.INVALID_PARAMETERS).encode()


@pytest.mark.anyio
@pytest.mark.parametrize("method", [0, 5, 0xFFFF])
async def test_an_unknown_method_is_rejected(log, records, anyio_backend, method):
    outcome = await drive(log.Log(), say(5, method), {TEXT: b"hello"})
    assert outcome.kind is OutcomeKind.REJECTED
    assert records.messages == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": "loud"}, "level"),
        ({"limit": 0}, "limit"),
        ({"limit": -1}, "limit"),
        ({"limit": 1 << 40}, "limit"),
        ({"color": True}, "color"),
        ({"level": 10}, "level"),
    ],
)
def test_wrong_settings_are_refused_by_name(log, wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, log.Log.Settings)


def test_settings_made_in_python_are_checked_too(log):
    with pytest.raises(ValueError, match="level is one of debug, info, warning, error"):
        log.Log.Settings(level="loud")


def test_loading_the_module_configures_no_logging(load_handler):
    before = logging.getLogger("vmibridge.guest").handlers[:]
    module = load_handler("log")
    module.Log(module.Log.Settings(level="error"))
    assert logging.getLogger("vmibridge.guest").handlers == before
    assert logging.getLogger("vmibridge.guest").level == logging.NOTSET
