"""How wide the trapping code's addresses are, and in which ring it runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.vm.arch.x86.segment import base_of, is_segmented_16, ring_of, width_of

laws = settings(max_examples=examples(200))
u64 = st.integers(0, (1 << 64) - 1)

PE = 0x1  # CR0
VM = 0x2_0000  # RFLAGS
LMA = 0x400  # EFER

# Descriptors as GDTs have them: base 0, limit 4 GiB, present, code.
FLAT_16 = 0x008F_9B00_0000_FFFF
FLAT_32 = 0x00CF_9B00_0000_FFFF
FLAT_64 = 0x00AF_9B00_0000_FFFF
# CS.L and CS.D together are reserved; a CPU refuses to load it in long mode.
BOTH_L_AND_D = FLAT_32 | FLAT_64

ANYTHING = 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.parametrize(
    ("state", "descriptor", "efer", "width"),
    [
        ("long mode, CS.L set", FLAT_64, LMA, 64),
        ("long mode, CS.L and CS.D set", BOTH_L_AND_D, LMA, 64),
        ("compatibility mode, CS.D set", FLAT_32, LMA, 32),
        ("compatibility mode, CS.D clear", FLAT_16, LMA, 16),
        ("protected mode, CS.D set", FLAT_32, 0, 32),
        ("protected mode, CS.D clear", FLAT_16, 0, 16),
        ("protected mode, where CS.L means nothing", FLAT_64, 0, 16),
        ("protected mode, where only CS.D counts", BOTH_L_AND_D, 0, 32),
        ("long mode enabled but not active", FLAT_64, 0x100, 16),
        ("other bits of EFER", FLAT_32, ANYTHING & ~LMA, 32),
        ("a null descriptor", 0, LMA, 16),
    ],
)
def test_the_width_is_that_of_the_code_segment(state, descriptor, efer, width):
    assert width_of(descriptor, efer) == width


@pytest.mark.parametrize(
    ("state", "cr0", "rflags", "segmented"),
    [
        ("real mode", 0, 0x2, True),
        ("real mode, other bits of CR0", ANYTHING & ~PE, 0x2, True),
        ("virtual-8086 mode", PE, VM | 0x2, True),
        ("protected mode", PE, 0x2, False),
        ("protected mode with paging", 0x8000_0001, 0x246, False),
        ("protected mode, other flags", PE, ANYTHING & ~VM, False),
    ],
)
def test_real_and_virtual_8086_mode_have_segments_of_the_16_bit_kind(state, cr0, rflags, segmented):
    assert is_segmented_16(cr0, rflags) is segmented


@pytest.mark.parametrize("rpl", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("state", "cr0", "rflags", "ring"),
    [
        ("real mode, where CS is no selector", 0, 0x2, 0),
        ("real mode, where VM means nothing", 0, VM | 0x2, 0),
        ("virtual-8086 mode", PE, VM | 0x2, 3),
        ("protected mode", PE, 0x2, None),
        ("protected mode, other flags", PE, ANYTHING & ~VM, None),
    ],
)
def test_the_ring_is_the_selectors_where_there_is_one(state, cr0, rflags, ring, rpl):
    assert ring_of(0xF000 | rpl, cr0, rflags) == (rpl if ring is None else ring)


@laws
@given(u64, u64)
def test_every_descriptor_gives_one_of_the_three_widths(descriptor, efer):
    width = width_of(descriptor, efer)
    assert width in (16, 32, 64)
    assert width != 64 or efer & LMA


@laws
@given(st.integers(0, 0xFFFF), u64, u64)
def test_every_selector_gives_one_of_the_four_rings(cs, cr0, rflags):
    assert ring_of(cs, cr0, rflags) in (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("descriptor", "base"),
    [
        (FLAT_32, 0),
        (0x12CF_9B34_5678_FFFF, 0x1234_5678),
        (0xFF00_0000_0000_0000, 0xFF00_0000),
        (0x0000_00FF_0000_0000, 0x00FF_0000),
        (0x0000_0000_FFFF_0000, 0x0000_FFFF),
        # The limit, the type and the flags are none of it.
        (0x00FF_FF00_0000_FFFF, 0),
    ],
)
def test_a_descriptor_has_its_base_in_three_pieces(descriptor, base):
    assert base_of(descriptor) == base
