"""Packets, responses, contracts and method codes: values out of range are refused at once."""

import msgspec
import pytest
from dispatch_parts import MAGIC, Answering, ask, overriding

from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler, method
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.bridge.status import Status

# --- ranges: refused where they are written -----------------------------------------


@pytest.mark.parametrize(
    ("field", "bits"),
    [
        ("magic", 32),
        ("request", 16),
        ("method", 16),
        ("value1", 64),
        ("value2", 64),
        ("value3", 64),
        ("value4", 64),
    ],
)
def test_a_packets_fields_have_their_widths(field, bits):
    fields = {"magic": 0, "request": 0, "method": 0}
    most = (1 << bits) - 1
    assert getattr(BridgePacket(**fields | {field: most}), field) == most
    for value in (-1, 1 << bits, -(1 << bits), 1 << 200):
        with pytest.raises(ValueError, match="out of range"):
            BridgePacket(**fields | {field: value})


def test_a_packet_without_values_has_zeros():
    assert BridgePacket(1, 2, 3) == BridgePacket(1, 2, 3, 0, 0, 0, 0)
    assert BridgePacket(1, 2, 3, 4, 5, 6, 7).values == (4, 5, 6, 7)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [-1, 1 << 64, 1 << 200])
def test_a_copy_of_a_packet_or_response_is_checked_too(n, value):
    for original in (ask(), BridgeResponse(1, 2, 3, 4)):
        with pytest.raises(ValueError, match="out of range"):
            getattr(original, f"with_value{n}")(value)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_copy_differs_in_one_value_and_the_original_stays(n):
    packet, response = BridgePacket(1, 2, 3, 11, 12, 13, 14), BridgeResponse(21, 22, 23, 24, "out")
    for original in (packet, response):
        before = msgspec.structs.asdict(original)
        copy = getattr(original, f"with_value{n}")(99)
        assert msgspec.structs.asdict(copy) == before | {f"value{n}": 99}
        assert msgspec.structs.asdict(original) == before
    assert getattr(getattr(response, f"with_value{n}")(None), f"value{n}") is None


def test_a_response_may_get_an_output():
    assert BridgeResponse(1, 2, 3, 4).with_output("out") == BridgeResponse(1, 2, 3, 4, "out")
    assert BridgeResponse(1, output="out").with_output(None) == BridgeResponse(1)


@pytest.mark.parametrize("field", ["value1", "value2", "value3", "value4"])
def test_a_responses_values_have_64_bits(field):
    most = (1 << 64) - 1
    assert getattr(BridgeResponse(**{field: most}), field) == most
    assert getattr(BridgeResponse(**{field: 0}), field) == 0
    assert getattr(BridgeResponse(), field) is None
    for value in (-1, 1 << 64, 1 << 200):
        with pytest.raises(ValueError, match="out of range"):
            BridgeResponse(**{field: value})


@pytest.mark.parametrize(
    ("field", "bits"),
    [
        ("request", 16),
        ("magic", 32),
        ("verify_value1", 64),
        ("verify_value2", 64),
        ("verify_value3", 64),
        ("verify_value4", 64),
    ],
)
def test_a_contracts_fields_have_their_widths(field, bits):
    most = (1 << bits) - 1
    assert getattr(BridgeContract(**{"request": 0, field: most}), field) == most
    for value in (-1, 1 << bits):
        with pytest.raises(ValueError, match=f"{field.upper()} has {bits} bits"):
            BridgeContract(**{"request": 0, field: value})


@pytest.mark.parametrize(
    "wrong",
    [{"REQUEST": 1 << 16}, {"REQUEST": -1}, {"MAGIC": 1 << 32}, {"VERIFY_VALUE2": 1 << 64}],
)
def test_a_handler_whose_contract_is_out_of_range_makes_no_bridge(wrong):
    handler = type("Wrong", (overriding(),), wrong)()
    with pytest.raises(ValueError, match="bits"):
        Bridge(handler)
    with pytest.raises(ValueError, match="bits"):
        Bridge(Bridge(), Answering(), handler)


@pytest.mark.parametrize("code", [-1, 1 << 16, 1 << 32])
def test_a_method_code_has_16_bits(code):
    with pytest.raises(ValueError, match="16 bits"):
        method(code)


@pytest.mark.parametrize("code", [0, 0xFFFF])
def test_any_16_bits_are_a_method_code(code):
    @method(code)
    async def answer(self, vmi, packet): ...

    assert type("Any", (BridgeHandler,), {"answer": answer}).methods[code].name == "answer"


def test_structs_of_the_protocol_are_values():
    # Frozen, equal by content and fit for a set: a test may compare them whole.
    for value in (ask(), BridgeResponse(1, output="out"), BridgeContract(1, MAGIC), Status(1)):
        assert value == msgspec.structs.replace(value)
        assert len({value, msgspec.structs.replace(value)}) == 1
        with pytest.raises(AttributeError):
            setattr(value, value.__struct_fields__[0], 2)
