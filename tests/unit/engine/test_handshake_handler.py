"""The handshake, method by method. What is expected stands in docs/protocol.md, too."""

import math

import msgspec
import pytest
from flipping_host import INFO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge import Bridge, BridgePacket, BridgeServer, OutcomeKind
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.bridge.registers import form_of, read_packet, write_response
from vmibridge.engine.handshake import Feature, Host, Limit
from vmibridge.testing import FakeBackend, drive
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

pytestmark = pytest.mark.anyio

VERSION, DEADLINES, LIMITS, ECHO_LOW, ECHO_HIGH = 0x0001, 0x0002, 0x0003, 0x0010, 0x0011
METHODS = [VERSION, DEADLINES, LIMITS, ECHO_LOW, ECHO_HIGH]
STAMPS = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
MASK = {64: (1 << 64) - 1, 32: (1 << 32) - 1}
FORMS = [
    (reason, width)
    for reason in (TrapReason.VMCALL, TrapReason.VMMCALL, TrapReason.CPUID)
    for width in (64, 32)
]
every_form = pytest.mark.parametrize(
    ("reason", "width"), FORMS, ids=[f"{reason.value}-{width}" for reason, width in FORMS]
)


def host(**changed: object) -> Host:
    return Host(msgspec.structs.replace(INFO, **changed))


async def ask(handler: Host, method: int, *values: int) -> tuple[int, int]:
    """value1 and value2 of the answer, which is stamped."""
    outcome = await drive(handler, BridgePacket(STANDARD_MAGIC, 0x0000, method, *values))
    assert (outcome.kind, outcome.handler) == (OutcomeKind.HANDLED, "host")
    one, two, *stamps = outcome.response.values
    assert tuple(stamps) == STAMPS
    assert outcome.output is None
    return one, two


def trap(reason: TrapReason, width: int, method: int, values: tuple[int, ...]) -> TrapEvent:
    """A call as a guest of this form makes it: with as many of the values as it has."""
    fields = (STANDARD_MAGIC, method << 16, *values)
    registers = dict(zip(form_of(reason, width).names, fields, strict=False))
    return TrapEvent(1, reason, Registers(**registers), length=3, width=width)


async def call(handler: Host, event: TrapEvent) -> tuple[int | None, ...]:
    """What the guest has in the registers of an answer, from registers to registers."""
    outcome = await drive(handler, read_packet(event), event=event)
    assert outcome.kind is OutcomeKind.HANDLED
    return write_response(event, outcome.response).values


# --- the methods --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "bits"),
    [
        (Feature(0), 0),
        (Feature.WAIT, 1),
        (Feature.POLICY, 2),
        (Feature.QUOTA, 4),
        (Feature.WAIT | Feature.POLICY | Feature.QUOTA, 7),
        (Feature(0x8000_0000), 0x8000_0000),
    ],
)
async def test_the_version_comes_with_the_features(features, bits):
    assert await ask(host(features=features), VERSION) == (0x0001_0000, bits)


@pytest.mark.parametrize(
    ("seconds", "milliseconds"),
    [
        pytest.param(5.0, 5000, id="whole"),
        pytest.param(5, 5000, id="an-int"),
        pytest.param(0.25, 250, id="a-fraction"),
        pytest.param(0.001, 1, id="one"),
        # In binary, both products are a little over the whole number.
        pytest.param(0.07, 70, id="exact-in-decimals"),
        pytest.param(1.001, 1001, id="exact-in-decimals-2"),
        pytest.param(0.0001, 1, id="up-to-one"),
        pytest.param(5e-324, 1, id="the-smallest"),
        pytest.param(0.2501, 251, id="up"),
        pytest.param(4_294_967.294, 0xFFFF_FFFE, id="the-last-that-fits"),
        pytest.param(4_294_967.295, 0xFFFF_FFFF, id="at-the-end"),
        pytest.param(4_294_967.2941, 0xFFFF_FFFF, id="up-to-the-end"),
        pytest.param(4_294_967.296, 0xFFFF_FFFF, id="past-the-end"),
        pytest.param(1e300, 0xFFFF_FFFF, id="far-past-the-end"),
        pytest.param(math.inf, 0xFFFF_FFFF, id="infinity"),
    ],
)
async def test_times_are_milliseconds_rounded_up(seconds, milliseconds):
    handler = host(soft_timeout=seconds, timeout=seconds, result_timeout=seconds)
    assert await ask(handler, DEADLINES) == (milliseconds, milliseconds)
    assert await ask(handler, LIMITS, 3) == (milliseconds, 3)


async def test_the_soft_deadline_comes_first():
    assert await ask(host(), DEADLINES) == (250, 60_000)


async def test_a_soft_deadline_of_0_says_that_there_is_none():
    assert await ask(host(soft_timeout=None), DEADLINES) == (0, 60_000)


@pytest.mark.parametrize(
    ("selector", "limit"),
    [
        pytest.param(Limit.ACCESS, 16 << 20, id="access"),
        pytest.param(Limit.IN_FLIGHT, 17, id="in-flight"),
        pytest.param(Limit.RESULT_TIMEOUT, 30_000, id="result-timeout"),
        pytest.param(0, 0, id="none"),
        pytest.param(4, 0, id="of-a-newer-host"),
        pytest.param(1 << 32 | 1, 0, id="beyond-32-bits"),
        pytest.param(MASK[64], 0, id="the-last"),
    ],
)
async def test_value1_selects_a_limit(selector, limit):
    assert await ask(host(), LIMITS, selector) == (limit, 3)


def test_the_selectors_count_from_1():
    assert [(limit.value, limit.name) for limit in Limit] == [
        (1, "ACCESS"),
        (2, "IN_FLIGHT"),
        (3, "RESULT_TIMEOUT"),
    ]


@pytest.mark.parametrize(
    ("in_flight", "told"),
    [(1, 1), (0xFFFF_FFFF, 0xFFFF_FFFF), (1 << 32, 0xFFFF_FFFF), (1 << 80, 0xFFFF_FFFF)],
)
async def test_requests_in_flight_are_told_in_32_bits(in_flight, told):
    assert await ask(host(in_flight=in_flight), LIMITS, 2) == (told, 3)


async def test_a_result_that_is_not_kept_is_kept_for_0_milliseconds():
    assert await ask(host(result_timeout=0), LIMITS, 3) == (0, 3)


async def test_an_echo_sends_two_values_back():
    assert await ask(host(), ECHO_LOW, 1, 2, 3, 4) == (1, 2)
    assert await ask(host(), ECHO_HIGH, 1, 2, 3, 4) == (3, 4)


@pytest.mark.parametrize("method", [0x0000, 0x0004, 0x000F, 0x0012, 0xFFFF])
async def test_another_method_is_rejected(method):
    outcome = await drive(host(), BridgePacket(STANDARD_MAGIC, 0x0000, method))
    assert (outcome.kind, outcome.response) == (OutcomeKind.REJECTED, None)


def test_these_are_all_methods():
    assert list(Host.methods) == METHODS


@pytest.mark.parametrize(
    ("magic", "request_code"), [(STANDARD_MAGIC, 1), (STANDARD_MAGIC ^ 1, 0), (0, 0)]
)
async def test_it_answers_request_0_of_the_standard_magic_only(magic, request_code):
    outcome = await drive(host(), BridgePacket(magic, request_code, VERSION))
    assert outcome.kind is OutcomeKind.UNMATCHED


@pytest.mark.parametrize("method", METHODS)
def test_it_never_waits_and_needs_no_guest(method):
    # Without a context: it has no memory to touch. One step of the coroutine is all.
    answer = host().handle(None, BridgePacket(STANDARD_MAGIC, 0x0000, method, 1))
    with pytest.raises(StopIteration) as end:
        answer.send(None)
    assert end.value.value.value1 is not None


def test_several_vms_may_share_it():
    backends = [FakeBackend(vm="first"), FakeBackend(vm="second")]
    BridgeServer(backends, Bridge(Host(INFO)))


# --- what it is told ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("soft_timeout", 0.0, "soft_timeout must be above 0 seconds"),
        ("soft_timeout", math.nan, "soft_timeout must be above 0 seconds"),
        ("timeout", 0, "timeout must be above 0 seconds"),
        ("timeout", -1.0, "timeout must be above 0 seconds"),
        ("timeout", math.nan, "timeout must be above 0 seconds"),
        ("result_timeout", -0.1, "0 seconds or more, got -0.1"),
        ("result_timeout", math.nan, "0 seconds or more, got nan"),
        ("in_flight", 0, "at least one request"),
        ("in_flight", -1, "at least one request"),
        ("features", Feature(1 << 32), "32 bits, got 0x100000000"),
    ],
)
def test_what_makes_no_sense_is_refused(field, value, told):
    with pytest.raises(ValueError, match=told):
        msgspec.structs.replace(INFO, **{field: value})


# --- from registers to registers ----------------------------------------------------


@every_form
@pytest.mark.parametrize(
    ("method", "selector", "answer"),
    [
        (VERSION, 0, (0x0001_0000, 0xFFFF_FFFF)),
        (DEADLINES, 0, (0xFFFF_FFFF, 0xFFFF_FFFF)),
        (LIMITS, 1, (16 << 20, 3)),
        (LIMITS, 2, (0xFFFF_FFFF, 3)),
        (LIMITS, 3, (0xFFFF_FFFF, 3)),
        (LIMITS, 4, (0, 3)),
    ],
)
async def test_every_form_sees_all_of_an_answer(reason, width, method, selector, answer):
    handler = host(
        features=Feature(0xFFFF_FFFF),
        soft_timeout=math.inf,
        timeout=math.inf,
        result_timeout=math.inf,
        in_flight=1 << 40,
    )
    seen = await call(handler, trap(reason, width, method, (selector, 0, 0, 0)))
    assert seen == (*answer, *(stamp & MASK[width] for stamp in STAMPS))


@given(form=st.sampled_from(FORMS), values=st.tuples(*[st.integers(0, MASK[64])] * 4))
@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_an_echo_is_the_identity_on_every_register(form, values):
    reason, width = form
    # A VMCALL of x86 code has two registers for values; the host reads the others as 0.
    carried = len(form_of(reason, width).names) - 2
    expected = [value & MASK[width] if place < carried else 0 for place, value in enumerate(values)]
    stamps = [stamp & MASK[width] for stamp in STAMPS]
    handler = host()
    low = await call(handler, trap(reason, width, ECHO_LOW, values))
    assert list(low) == expected[:2] + stamps
    high = await call(handler, trap(reason, width, ECHO_HIGH, values))
    assert list(high) == expected[2:] + stamps
