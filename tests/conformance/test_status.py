"""The encoded status, and the codes of a gate."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.bridge.status import Gate, Status, StatusKind

laws = settings(max_examples=examples(300))
u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
statuses = st.builds(Status, stage=u8, kind=u8, code=u8, native=u32)

RESERVED = 0xFF00_0000


# --- the reference's vectors --------------------------------------------------------


def test_stage_5_and_waiting_encode_to_0x105():
    assert Status(stage=5, kind=StatusKind.WAITING).encode() == 0x105


def test_a_status_of_all_kinds_of_bits_decodes_and_loses_its_reserved_byte():
    status = Status.decode(0xFFFF_FFFF_AB5D_7CE6)
    assert (status.stage, status.kind, status.code) == (0xE6, 0x7C, 0x5D)
    assert status.native == 0xFFFF_FFFF
    assert status.encode() == 0xFFFF_FFFF_005D_7CE6


@pytest.mark.parametrize("native", [0x7FFF_FFFF, 0x8000_0000, 0x8000_4005, 0xC000_000D])
def test_a_native_code_round_trips_with_its_sign_bit(native):
    value = native << 32 | 0x0002_FE03
    status = Status.decode(value)
    assert status == Status(stage=3, kind=StatusKind.FAILED, code=2, native=native)
    assert status.encode() == value


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (StatusKind.SUCCESS, 0x00),
        (StatusKind.WAITING, 0x01),
        (StatusKind.INVALID_PARAMETERS, 0xFD),
        (StatusKind.FAILED, 0xFE),
        (StatusKind.ABORTED, 0xFF),
    ],
)
def test_a_kind_is_bits_8_to_15(kind, code):
    assert kind == code
    assert Status(kind=kind).encode() == code << 8
    assert Status.decode(code << 8).kind == kind


@pytest.mark.parametrize(
    ("field", "low", "bits"),
    [("stage", 0, 8), ("kind", 8, 8), ("code", 16, 8), ("native", 32, 32)],
)
def test_a_field_has_exactly_its_bits(field, low, bits):
    most = (1 << bits) - 1
    assert Status(**{field: most}).encode() == most << low
    assert getattr(Status.decode(most << low), field) == most
    assert getattr(Status.decode(~(most << low) & (1 << 64) - 1), field) == 0


@pytest.mark.parametrize(
    ("gate", "value1"), [(Gate.CONTINUE, 0), (Gate.WAIT, 1), (Gate.ABORT, 0xFFFF_FFFF)]
)
def test_a_gate_answers_with_its_code(gate, value1):
    assert gate == value1


# --- laws ---------------------------------------------------------------------------


@laws
@given(statuses)
def test_a_status_decodes_to_what_was_encoded(status):
    assert Status.decode(status.encode()) == status


@laws
@given(u64)
def test_any_64_bits_are_a_status_that_encodes_to_all_but_the_reserved_byte(value):
    assert Status.decode(value).encode() == value & ~RESERVED


@laws
@given(statuses, u8)
def test_the_reserved_byte_is_ignored(status, reserved):
    assert Status.decode(status.encode() | reserved << 24) == status


def test_a_kind_that_a_newer_guest_made_up_is_kept():
    assert Status.decode(0x4200).kind == 0x42


def test_a_status_by_default_is_success():
    assert Status() == Status.decode(0)
    assert Status().kind is StatusKind.SUCCESS


# --- ranges -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1 << 64, -(1 << 64)])
def test_what_is_not_64_bits_does_not_decode(value):
    with pytest.raises(ValueError, match="64 bits"):
        Status.decode(value)


@pytest.mark.parametrize(
    "field",
    [
        {"stage": -1},
        {"stage": 0x100},
        {"kind": -1},
        {"kind": 0x100},
        {"code": -1},
        {"code": 0x100},
        {"native": -1},
        {"native": 1 << 32},
    ],
)
def test_a_field_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match="out of range"):
        Status(**field)


def test_a_status_is_shown_in_its_own_words():
    assert repr(Status(5, StatusKind.WAITING)) == "Status(stage=5, kind=WAITING, code=0, native=0)"
    assert repr(Status(kind=0x7C)) == "Status(stage=0, kind=0x7c, code=0, native=0)"
