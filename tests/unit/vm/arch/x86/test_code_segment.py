"""The code segment, from whichever of its sources a backend has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.vm.arch.x86.code import (
    CODE_64,
    CodeSegment,
    segment_of_cache,
    segment_of_descriptor,
    segment_of_mode,
)
from vmibridge.vm.arch.x86.registers import CR0_PE, EFER_LMA, RFLAGS_VM

laws = settings(max_examples=examples(200))
# As Linux has them (arch/x86/include/asm/segment.h, arch/x86/kernel/cpu/common.c).
KERNEL32, KERNEL64 = 0x00CF9B000000FFFF, 0x00AF9B000000FFFF
BASED16, BASED32 = 0x12009B345678FFFF, 0x12CF9B345678FFFF
BASED64 = 0x12AF9B345678FFFF
BASE = 0x12345678


@pytest.mark.parametrize(
    ("descriptor", "efer", "segment"),
    [
        (KERNEL32, 0, CodeSegment(0, 32)),
        (KERNEL32, EFER_LMA, CodeSegment(0, 32)),
        (KERNEL64, EFER_LMA, CODE_64),
        (BASED16, 0, CodeSegment(BASE, 16)),
        (BASED32, EFER_LMA, CodeSegment(BASE, 32)),
        # The processor ignores it.
        (BASED64, EFER_LMA, CODE_64),
        # L counts in long mode only; D is not set.
        (BASED64, 0, CodeSegment(BASE, 16)),
    ],
)
def test_a_descriptor_gives_base_and_width(descriptor, efer, segment):
    assert segment_of_descriptor(descriptor, efer) == segment
    # What the processor has loaded of it is the same, as the monitor of QEMU shows it.
    assert segment_of_cache(BASE if descriptor >> 56 else 0, descriptor >> 32, efer) == segment


@pytest.mark.parametrize(
    ("cr0", "rflags", "segment"),
    [
        (0, 0, CodeSegment(0xF0000, 16)),
        (CR0_PE, RFLAGS_VM, CodeSegment(0xF0000, 16)),
        (CR0_PE, 0, None),
    ],
    ids=["real", "virtual-8086", "protected"],
)
def test_16_bit_modes_have_no_descriptor(cr0, rflags, segment):
    assert segment_of_mode(0xF000, cr0, rflags) == segment


@pytest.mark.parametrize(
    ("segment", "ip", "linear"),
    [
        (CodeSegment(0xF0000, 16), 0xFFF0, 0xFFFF0),
        # More than 1 MiB: what the A20 gate does to it is not the segment's.
        (CodeSegment(0xFFFF0, 16), 0xFFFF, 0x10FFEF),
        (CodeSegment(BASE, 32), 0x1000, BASE + 0x1000),
        (CodeSegment(0xFFFFF000, 32), 0x1234, 0x234),
        (CODE_64, 0xFFFFFFFF81000000, 0xFFFFFFFF81000000),
        (CODE_64, (1 << 64) + 5, 5),
    ],
)
def test_an_offset_has_a_linear_address(segment, ip, linear):
    assert segment.linear(ip) == linear


@laws
@given(st.integers(0, (1 << 64) - 1), st.sampled_from([0, EFER_LMA]))
def test_any_descriptor_gives_a_segment(descriptor, efer):
    segment = segment_of_descriptor(descriptor, efer)
    assert segment.width in (16, 32, 64)
    assert 0 <= segment.base < 1 << 32
    assert segment == segment_of_cache(segment.base, descriptor >> 32, efer)
