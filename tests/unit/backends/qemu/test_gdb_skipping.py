"""Traps that are made to do nothing, and how they become traps again."""

import pytest

from vmibridge.backends.qemu.gdb.skipping import nop, patch_of, unpatched
from vmibridge.vm.arch.x86.instruction import decode_trap

CPUID, VMCALL, VMMCALL = b"\x0f\xa2", b"\x0f\x01\xc1", b"\x0f\x01\xd9"
PREFIXES = [b"", b"\x66", b"\x3e\x66", b"\x48", b"\x66\x4f", b"\x2e" * 12]


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("trap", [VMCALL, VMMCALL])
def test_a_trap_becomes_as_long_an_instruction_and_is_found_again(trap, prefixes):
    code = prefixes + trap
    reason, length = decode_trap(code, 64)
    offset, before, after = patch_of(reason, length)
    assert code[offset : offset + len(before)] == before
    assert len(before) == len(after)
    skips = code[:offset] + after + code[offset + len(before) :]
    assert decode_trap(skips, 64) is None
    assert unpatched(skips + b"\x90" * 3, 64) == code + b"\x90" * 3


def test_a_cpuid_stays_what_it_is():
    assert patch_of(*decode_trap(CPUID, 64)) is None


@pytest.mark.parametrize("length", range(2, 16))
def test_for_a_step_one_instruction_of_any_length_does_nothing(length):
    """With F3 it would be PAUSE, and with REX.B an exchange: it has the prefix 66 alone."""
    code = nop(length)
    assert (len(code), code[-1], set(code[:-1])) == (length, 0x90, {0x66})


@pytest.mark.parametrize("code", [b"", b"\x0f\x1f", b"\x0f\x1f\x40\x00", b"\x90" * 15, VMCALL])
def test_other_code_is_not_taken_for_one(code):
    assert unpatched(code, 64) is None
