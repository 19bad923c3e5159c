"""The code segment: how wide the trapping code's addresses are, and its ring.

| state | width |
|---|---|
| real mode, virtual-8086 mode | 16 |
| long mode, CS.L set | 64 |
| otherwise, CS.D set | 32 |
| otherwise | 16 |

Intel SDM volume 3, sections 3.4.5 (descriptors) and 5.5 (the privilege level is
the RPL of CS in protected mode, 3 in virtual-8086 mode).
"""

from vmibridge.vm.arch.x86.registers import CR0_PE, EFER_LMA, RFLAGS_VM

DESCRIPTOR_SIZE = 8
_DESCRIPTOR_L = 1 << 53
_DESCRIPTOR_D = 1 << 54


def is_segmented_16(cr0: int, rflags: int) -> bool:
    """Whether segments are the 16-bit kind of real and virtual-8086 mode."""
    return not cr0 & CR0_PE or bool(rflags & RFLAGS_VM)


def ring_of(cs: int, cr0: int, rflags: int) -> int:
    """The privilege level of code that runs with this CS selector."""
    if not cr0 & CR0_PE:
        return 0
    return 3 if rflags & RFLAGS_VM else cs & 3


def width_of(descriptor: int, efer: int) -> int:
    """The address width in bits that an 8-byte code descriptor gives."""
    if efer & EFER_LMA and descriptor & _DESCRIPTOR_L:
        return 64
    return 32 if descriptor & _DESCRIPTOR_D else 16


def base_of(descriptor: int) -> int:
    """The 32-bit base address of an 8-byte descriptor."""
    return descriptor >> 16 & 0xFF_FFFF | descriptor >> 56 << 24
