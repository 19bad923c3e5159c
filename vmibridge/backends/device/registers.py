"""A call as the registers of a 64-bit VMCALL, with the address space that is believed of it."""

from typing import Final

from vmibridge.backends.device.slots import (
    PAGING_4_LEVELS,
    PAGING_5_LEVELS,
    PAGING_32BIT,
    PAGING_PAE,
    SPACE_SLOT,
    Call,
    Slots,
)
from vmibridge.vm.arch.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
)
from vmibridge.vm.trap import Registers

__all__ = ["registers_of"]

_CR0 = CR0_PE | CR0_WP | CR0_PG
_PAGING: Final = {
    PAGING_4_LEVELS: (_CR0, CR4_PAE, EFER_LMA),
    PAGING_5_LEVELS: (_CR0, CR4_PAE | CR4_LA57, EFER_LMA),
    PAGING_PAE: (_CR0, CR4_PAE, 0),
    PAGING_32BIT: (_CR0, CR4_PSE, 0),
}
"""CR0, CR4 and EFER of each paging mode."""


def registers_of(call: Call, slots: Slots, kernel: int) -> Registers:
    """The registers of a call, of whose slots the first `kernel` are the guest's kernel's.

    Without an address space, CR0 is 0.
    """
    root, paging = _space_of(call, slots, kernel)
    cr0, cr4, efer = _PAGING[paging] if root else (0, 0, 0)
    value1, value2, value3, value4 = call.values
    return Registers(
        rcx=call.magic,
        rdx=call.request | call.method << 16,
        r8=value1,
        r9=value2,
        r10=value3,
        r11=value4,
        cr0=cr0,
        cr3=root,
        cr4=cr4,
        efer=efer,
    )


def _space_of(call: Call, slots: Slots, kernel: int) -> tuple[int, int]:
    """The root of the page tables that are believed, and their mode; 0: there are none."""
    if call.space == SPACE_SLOT:
        return 0, PAGING_4_LEVELS
    if call.slot < kernel:
        return call.space, call.paging
    found = slots.space_of(call.slot) if kernel else None
    return (0, PAGING_4_LEVELS) if found is None else (found.root, found.paging)
