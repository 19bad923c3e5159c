"""The standard contract, and how a contract's stamps get into a response."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    BridgeContract,
)
from vmibridge.bridge.handler import BridgeHandler, contract_of
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import write_response
from vmibridge.bridge.response import BridgeResponse
from vmibridge.testing import drive
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

laws = settings(max_examples=examples(200))
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
maybe = st.none() | u64
VALUES = ("value1", "value2", "value3", "value4")


class Standard(BridgeHandler[str]):
    """A handler with the standard contract that answers what its test tells it to."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0012
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    def __init__(self, response):
        self.response = response

    async def handle(self, vmi, packet):
        if isinstance(self.response, Exception):
            raise self.response
        return self.response


REQUEST = BridgePacket(STANDARD_MAGIC, 0x0012, 0x0001)


@pytest.mark.parametrize(
    ("constant", "value", "text"),
    [
        (STANDARD_MAGIC, 0x42494D56, b"VMIB"),
        (STANDARD_VERIFY_VALUE3, 0x213353522D494D56, b"VMI-RS3!"),
        (STANDARD_VERIFY_VALUE4, 0x213453522D494D56, b"VMI-RS4!"),
    ],
    ids=["magic", "verify value 3", "verify value 4"],
)
def test_a_standard_constant_reads_as_little_endian_bytes(constant, value, text):
    assert constant == value
    assert constant.to_bytes(len(text), "little") == text


# --- stamping -----------------------------------------------------------------------


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_a_stamp_overwrites_the_handlers_value_in_its_slot_only(slot):
    contract = BridgeContract(1, **{f"verify_value{slot}": 0x57A3})
    expected = {name: n for n, name in enumerate(VALUES, 1)} | {f"value{slot}": 0x57A3}
    assert contract.stamp(BridgeResponse(1, 2, 3, 4)) == BridgeResponse(**expected)


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_a_stamp_fills_a_slot_that_the_handler_left_empty(slot):
    contract = BridgeContract(1, **{f"verify_value{slot}": 0x57A3})
    assert contract.stamp(BridgeResponse()) == BridgeResponse(**{f"value{slot}": 0x57A3})


def test_zero_is_a_stamp():
    assert BridgeContract(1, verify_value1=0).stamp(BridgeResponse(7)) == BridgeResponse(0)


def test_a_contract_without_stamps_leaves_the_response_as_it_is():
    response = BridgeResponse(1, None, 0, 4, "output")
    assert BridgeContract(1, STANDARD_MAGIC).stamp(response) == response


@laws
@given(st.tuples(maybe, maybe, maybe, maybe), st.tuples(maybe, maybe, maybe, maybe))
def test_each_slot_is_the_stamp_where_there_is_one_else_the_handlers(stamps, values):
    stamped = BridgeContract(1, None, *stamps).stamp(BridgeResponse(*values, output="kept"))
    assert stamped.values == tuple(
        value if stamp is None else stamp for stamp, value in zip(stamps, values, strict=True)
    )
    assert stamped.output == "kept"


@laws
@given(st.tuples(maybe, maybe, maybe, maybe), st.tuples(maybe, maybe, maybe, maybe))
def test_stamping_twice_is_stamping_once(stamps, values):
    contract = BridgeContract(1, None, *stamps)
    once = contract.stamp(BridgeResponse(*values))
    assert contract.stamp(once) == once


# --- only what is handled is stamped ------------------------------------------------


@pytest.mark.anyio
async def test_a_handled_request_is_stamped_after_the_handler():
    outcome = await drive(Standard(BridgeResponse(1, 2, 3, 4, "output")), REQUEST)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response == BridgeResponse(
        1, 2, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4, "output"
    )


@pytest.mark.anyio
async def test_a_handler_may_stamp_every_value():
    class Sealed(Standard):
        VERIFY_VALUE1, VERIFY_VALUE2 = 0x11, 0x22

    outcome = await drive(Sealed(BridgeResponse(1, 2, 3, 4)), REQUEST)
    assert outcome.response.values == (0x11, 0x22, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)


@pytest.mark.anyio
async def test_an_empty_response_is_handled_and_stamped():
    # Such as the answer to the exit method.
    outcome = await drive(Standard(BridgeResponse()), REQUEST)
    assert outcome.kind is OutcomeKind.HANDLED
    assert outcome.response.values == (None, None, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "packet", "kind"),
    [
        (None, REQUEST, OutcomeKind.REJECTED),
        (RuntimeError("broken"), REQUEST, OutcomeKind.FAILED),
        (BridgeResponse(1), BridgePacket(STANDARD_MAGIC, 0x0013, 1), OutcomeKind.UNMATCHED),
        (BridgeResponse(1), BridgePacket(STANDARD_MAGIC ^ 1, 0x0012, 1), OutcomeKind.UNMATCHED),
    ],
    ids=["rejected", "failed", "unmatched request", "unmatched magic"],
)
async def test_nothing_else_is_stamped(answer, packet, kind):
    outcome = await drive(Standard(answer), packet)
    assert outcome.kind is kind
    assert outcome.response is None


# --- what the guest sees of it ------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("width", "rcx", "rdx"),
    [
        (64, b"VMI-RS3!", b"VMI-RS4!"),
        # Eight bytes cannot fit, so an x86 guest compares the four that do.
        (32, b"VMI-", b"VMI-"),
    ],
    ids=["x64", "x86"],
)
async def test_the_guest_reads_the_stamps_in_rcx_and_rdx(width, rcx, rdx):
    event = TrapEvent(1, TrapReason.VMCALL, Registers(), width=width, length=3)
    outcome = await drive(Standard(BridgeResponse(value1=7)), REQUEST, event=event)
    writes = write_response(event, outcome.response)
    assert writes.rcx.to_bytes(width // 8, "little") == rcx
    assert writes.rdx.to_bytes(width // 8, "little") == rdx
    assert (writes.rax, writes.rbx) == (7, None)


# --- a handler's contract -----------------------------------------------------------


def test_a_handlers_class_variables_are_its_contract():
    assert Standard(None).contract == BridgeContract(
        request=0x0012,
        magic=STANDARD_MAGIC,
        verify_value3=STANDARD_VERIFY_VALUE3,
        verify_value4=STANDARD_VERIFY_VALUE4,
    )


def test_a_handler_without_request_has_no_contract():
    class Nameless(BridgeHandler):
        async def handle(self, vmi, packet):
            return None

    with pytest.raises(ValueError, match="Nameless has no REQUEST"):
        _ = Nameless().contract
    with pytest.raises(ValueError, match="Nameless has no REQUEST"):
        contract_of(Nameless)


def test_a_class_of_handlers_has_the_contract_of_its_instances():
    assert contract_of(Standard) == Standard(None).contract
