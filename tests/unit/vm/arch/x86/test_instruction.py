"""Which trap instruction stands in machine code, and how long it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap, is_locked
from vmibridge.vm.trap import TrapReason

laws = settings(max_examples=examples(300))

OPCODES = [
    (bytes.fromhex("0F A2"), TrapReason.CPUID),
    (bytes.fromhex("0F 01 C1"), TrapReason.VMCALL),
    (bytes.fromhex("0F 01 D9"), TrapReason.VMMCALL),
]
# Intel SDM volume 2, section 2.1.1: groups 1 to 4, without LOCK (F0).
LEGACY = [0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x66, 0x67]
REX = range(0x40, 0x50)
WIDTHS = [16, 32, 64]

every_trap = pytest.mark.parametrize(
    ("opcode", "reason"), OPCODES, ids=[reason.value for _, reason in OPCODES]
)
every_width = pytest.mark.parametrize("width", WIDTHS)


@every_width
@every_trap
def test_a_trap_instruction_is_told_by_its_opcode(opcode, reason, width):
    assert decode_trap(opcode, width) == (reason, len(opcode))


@every_width
@every_trap
def test_what_follows_the_instruction_does_not_matter(opcode, reason, width):
    assert decode_trap(opcode + b"\xf0\x0f\xff", width) == (reason, len(opcode))


@every_width
@every_trap
@pytest.mark.parametrize("prefix", LEGACY, ids=[f"{prefix:02x}" for prefix in LEGACY])
def test_a_legacy_prefix_counts_as_a_byte_of_the_instruction(prefix, opcode, reason, width):
    assert decode_trap(bytes([prefix]) + opcode, width) == (reason, 1 + len(opcode))


@every_width
@every_trap
def test_prefixes_come_in_any_number_and_order(opcode, reason, width):
    code = bytes(LEGACY) + opcode
    assert decode_trap(code, width) == (reason, len(code))
    code = bytes(reversed(LEGACY)) + opcode
    assert decode_trap(code, width) == (reason, len(code))


@every_trap
@pytest.mark.parametrize("rex", REX, ids=[f"{rex:02x}" for rex in REX])
def test_rex_is_a_prefix_in_64_bit_code(rex, opcode, reason):
    assert decode_trap(bytes([rex]) + opcode, 64) == (reason, 1 + len(opcode))


@pytest.mark.parametrize("width", [16, 32])
@every_trap
@pytest.mark.parametrize("rex", REX, ids=[f"{rex:02x}" for rex in REX])
def test_elsewhere_the_same_byte_is_an_instruction_of_its_own(rex, opcode, reason, width):
    # INC and DEC of a register.
    assert decode_trap(bytes([rex]) + opcode, width) is None


@every_trap
def test_rex_comes_after_legacy_prefixes(opcode, reason):
    assert decode_trap(b"\x66\x48" + opcode, 64) == (reason, 2 + len(opcode))


@every_trap
def test_a_rex_that_is_not_last_is_ignored_by_the_cpu_yet_has_its_byte(opcode, reason):
    # Section 2.2.1: a REX before another prefix has no effect; it is no error.
    assert decode_trap(b"\x48\x66" + opcode, 64) == (reason, 2 + len(opcode))
    assert decode_trap(b"\x48\x41" + opcode, 64) == (reason, 2 + len(opcode))


@every_width
@every_trap
def test_an_instruction_has_at_most_15_bytes(opcode, reason, width):
    most = b"\x66" * (15 - len(opcode)) + opcode
    assert decode_trap(most, width) == (reason, 15)
    assert decode_trap(b"\x66" + most, width) is None
    assert decode_trap(b"\x66" * 1000 + opcode, width) is None
    assert MAX_INSTRUCTION == 15


@every_width
@every_trap
@pytest.mark.parametrize("prefixes", ["F0", "66 F0", "F0 66", "F0 F0"])
def test_a_locked_one_is_undefined_and_so_none_of_ours(prefixes, opcode, reason, width):
    assert decode_trap(bytes.fromhex(prefixes) + opcode, width) is None


@every_trap
def test_a_lock_behind_rex_is_none_of_ours_either(opcode, reason):
    assert decode_trap(b"\x48\xf0" + opcode, 64) is None


@every_width
@every_trap
@pytest.mark.parametrize("prefixes", [b"", b"\x66", b"\xf3\x2e\x66"])
def test_code_that_ends_within_the_instruction_is_none(prefixes, opcode, reason, width):
    code = prefixes + opcode
    for size in range(len(code)):
        assert decode_trap(code[:size], width) is None


@every_width
@pytest.mark.parametrize(
    "code",
    [
        "90",
        "CC",
        "0F 05",
        "0F 0B",
        "0F A0",
        "0F A3",
        "0F 01 C0",
        "0F 01 C2",
        "0F 01 D0",
        "0F 01 D8",
        "0F 01 DA",
        "0F 01 F9",
        "A2 0F",
        "00 0F A2",
        "0F 0F A2",
        "0F 66 A2",
    ],
)
def test_other_instructions_are_none(code, width):
    assert decode_trap(bytes.fromhex(code) + b"\x00" * 13, width) is None


@laws
@given(st.binary(max_size=40), st.sampled_from(WIDTHS))
def test_any_bytes_are_a_trap_of_at_most_15_bytes_or_none(code, width):
    check(code, width)


@laws
@given(
    st.lists(st.sampled_from([*LEGACY, *REX, 0xF0]), max_size=18).map(bytes),
    st.sampled_from([opcode for opcode, _ in OPCODES]),
    st.binary(max_size=4),
    st.sampled_from(WIDTHS),
)
def test_bytes_that_look_like_a_trap_are_one_only_with_prefixes_in_front(
    prefixes, opcode, rest, width
):
    allowed = {*LEGACY, *REX} if width == 64 else {*LEGACY}
    length = len(prefixes) + len(opcode)
    found = decode_trap(prefixes + opcode + rest, width)
    if length <= 15 and allowed.issuperset(prefixes):
        assert found == (dict(OPCODES)[opcode], length)
    else:
        assert found is None
    check(prefixes + opcode + rest, width)


def check(code: bytes, width: int) -> None:
    found = decode_trap(code, width)
    if found is None:
        return
    reason, length = found
    assert 2 <= length <= min(15, len(code))
    opcode = next(opcode for opcode, meant in OPCODES if meant is reason)
    assert code[:length].endswith(opcode)
    # No byte beyond the instruction was needed to tell it.
    assert decode_trap(code[:length], width) == found


class TestLock:
    """LOCK before what cannot be locked raises #UD: Intel SDM volume 2, LOCK."""

    @every_width
    @every_trap
    @pytest.mark.parametrize("prefixes", [b"\xf0", b"\x66\xf0", b"\xf0\x2e\xf0"])
    def test_a_locked_trap_instruction_is_none_of_ours(self, opcode, reason, width, prefixes):
        assert decode_trap(prefixes + opcode, width) is None
        assert is_locked(prefixes + opcode, width)

    def test_rex_may_stand_among_the_prefixes_of_64_bit_code_only(self):
        code = b"\x48\xf0\x0f\xa2"
        assert [is_locked(code, width) for width in WIDTHS] == [False, False, True]

    @every_width
    @pytest.mark.parametrize(
        "code", [b"", b"\xf0", b"\x0f\xa2", b"\xf0\x0f\x0b", b"\x90\xf0\x0f\xa2"]
    )
    def test_other_code_is_not_a_locked_trap(self, width, code):
        assert not is_locked(code, width)
