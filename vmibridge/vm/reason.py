"""Why a vCPU was trapped: the instruction that a backend intercepted."""

from enum import Enum
from typing import TYPE_CHECKING


class TrapReason(Enum):
    """The instruction that a backend intercepted. Each is one of a single architecture."""

    CPUID = "cpuid"
    VMCALL = "vmcall"
    """Intel's hypercall, 0F 01 C1."""
    VMMCALL = "vmmcall"
    """AMD's spelling, 0F 01 D9; to the bridge the same as VMCALL."""
    PORT_IO = "port-io"
    MSR = "msr"
    BREAKPOINT = "breakpoint"

    # Members are singletons, and the hash of an Enum is a function in Python.
    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__
