"""A trap for a policy, and a guard that is asked."""

from vmibridge.engine.access_policy import (
    Guard,
)
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

VM_BYTES = "over the byte quota of the VM"


SPACE_BYTES = "over the byte quota of the address space"
TOO_MANY = "too many address spaces"


def trap(root: int = 0x1000, *, ring: int = 3, ip: int = 0x401000) -> TrapEvent:
    return TrapEvent(1, TrapReason.VMCALL, Registers(cr3=root), ip=ip, length=3, ring=ring)


def let_through(guard: Guard, now: float, root: int = 0x1000, most: int = 1000) -> int:
    """How many traps in a row are let through at this time."""
    for count in range(most):
        if guard.denies(trap(root), now) is not None:
            return count
    return most
