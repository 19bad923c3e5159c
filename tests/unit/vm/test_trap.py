"""A trap's address space: the root of its page tables, and nothing else that CR3 holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

PG, PAE, LMA = 1 << 31, 1 << 5, 1 << 10
TOP = (1 << 64) - 1
CR3 = st.integers(0, TOP)

# Intel SDM volume 3A, tables 4-3, 4-7, 4-12 and 4-13: the bits of CR3 that hold the address.
MODES = {
    "none": ({}, range(12, 52)),
    "none yet, PAE set": ({"cr4": PAE}, range(12, 52)),
    "32-bit": ({"cr0": PG}, range(12, 32)),
    "PAE": ({"cr0": PG, "cr4": PAE}, range(5, 32)),
    "4 levels": ({"cr0": PG, "cr4": PAE, "efer": LMA}, range(12, 52)),
    "5 levels": ({"cr0": PG, "cr4": PAE | 1 << 12, "efer": LMA}, range(12, 52)),
    "4 levels, PCID": ({"cr0": PG, "cr4": PAE | 1 << 17, "efer": LMA}, range(12, 52)),
}
modes = pytest.mark.parametrize(("state", "bits"), MODES.values(), ids=MODES.keys())


def address_space(cr3: int, **state: int) -> int:
    return TrapEvent(1, TrapReason.VMCALL, Registers(cr3=cr3, **state)).address_space


@modes
def test_each_bit_of_cr3_names_the_address_space_or_does_not(state, bits):
    named = [bit for bit in range(64) if address_space(1 << bit, **state)]
    assert named == list(bits)


@modes
@given(CR3)
def test_the_address_space_is_the_bits_of_the_root_in_place(state, bits, cr3):
    assert address_space(cr3, **state) == cr3 & sum(1 << bit for bit in bits)


@pytest.mark.parametrize("changed", [0x5, 0xFFF, 1 << 61, 1 << 62, 1 << 63, 3 << 61 | 1 << 63 | 7])
def test_a_process_keeps_its_address_space_as_its_pcid_and_its_masking_change(changed):
    long_mode = {"cr0": PG, "cr4": PAE | 1 << 17, "efer": LMA}
    assert address_space(0x1_2345_6000 | changed, **long_mode) == 0x1_2345_6000


def test_a_kernel_that_isolates_its_page_tables_has_two_roots_for_a_process():
    long_mode = {"cr0": PG, "cr4": PAE | 1 << 17, "efer": LMA}
    assert address_space(0x1234_6001, **long_mode) == 0x1234_6000
    assert address_space(0x1234_7801, **long_mode) == 0x1234_7000
