"""Why a vCPU was trapped: the instruction that a backend intercepted, or a call by a device."""

from enum import Enum
from typing import TYPE_CHECKING


class TrapReason(Enum):
    """What a backend intercepted. Each is one of a single architecture."""

    CPUID = "cpuid"
    VMCALL = "vmcall"
    """Intel's hypercall, 0F 01 C1."""
    VMMCALL = "vmmcall"
    """AMD's spelling, 0F 01 D9; to the bridge the same as VMCALL."""
    DEVICE = "device"
    """No instruction: the guest has rung for a call slot of a PCI device. Its fields are in the
    registers of a 64-bit VMCALL; there is no instruction pointer, and the vCPU may go on."""
    PORT_IO = "port-io"
    MSR = "msr"
    BREAKPOINT = "breakpoint"

    # Members are singletons, and the hash of an Enum is a function in Python.
    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__
