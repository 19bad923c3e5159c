"""A trap: what a backend saw, and what it is to write back.

The vCPU stands still between the two. Registers are named as in the vendors'
manuals; values are unsigned, and an x86 guest's are zero-extended.
"""

from enum import Enum

import msgspec


class TrapReason(Enum):
    """The instruction that a backend intercepted."""

    CPUID = "cpuid"
    VMCALL = "vmcall"
    """Intel's hypercall, 0F 01 C1."""
    VMMCALL = "vmmcall"
    """AMD's spelling, 0F 01 D9; to the bridge the same as VMCALL."""
    PORT_IO = "port-io"
    MSR = "msr"
    BREAKPOINT = "breakpoint"


class Registers(msgspec.Struct, frozen=True, gc=False):
    """The registers of one vCPU at a trap, 64 bits each.

    CR0, CR3, CR4 and EFER say how the guest's virtual addresses are mapped.
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rbp: int = 0
    rsp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 0x2
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


class TrapEvent(msgspec.Struct, frozen=True, gc=False):
    """One trap of one vCPU."""

    seq: int
    """Counts the traps of one backend, from 1."""
    reason: TrapReason
    registers: Registers
    vm: str = "vm"
    """The name of the VM, unique within a server."""
    vcpu: int = 0
    ip: int = 0
    """RIP, EIP or IP of the trapping instruction: an offset in its code segment."""
    length: int = 0
    """Bytes of the instruction, prefixes included."""
    width: int = 64
    """Effective address width at the trap, in bits: 64, 32 or 16."""
    ring: int = 0
    """Privilege level of the trapping code, 0 to 3."""

    @property
    def address_space(self) -> int:
        """CR3 at the trap."""
        return self.registers.cr3


class RegisterWrites(msgspec.Struct, frozen=True, gc=False):
    """What goes back into the vCPU; `None` leaves a register as it was.

    `rip` moves past the trapping instruction, so that it does not run natively.
    """

    rip: int
    rax: int | None = None
    rbx: int | None = None
    rcx: int | None = None
    rdx: int | None = None

    @property
    def values(self) -> tuple[int | None, int | None, int | None, int | None]:
        """value1 to value4 as written."""
        return (self.rax, self.rbx, self.rcx, self.rdx)


class TrapFilter(msgspec.Struct, frozen=True):
    """Which traps are a bridge's own. A backend drops the others below Python objects."""

    magics: frozenset[int] = frozenset()
    any_hypercall: bool = False
    """A handler without magic makes every VMCALL and VMMCALL ours."""
    any_cpuid: bool = False
    """The same for CPUID, which takes an explicit opt-in."""

    def wants(self, reason: TrapReason, magic: int) -> bool:
        """Whether a trap with this magic (its low 32 bits) is ours."""
        if reason is TrapReason.CPUID:
            return self.any_cpuid or magic & 0xFFFF_FFFF in self.magics
        if reason is TrapReason.VMCALL or reason is TrapReason.VMMCALL:
            return self.any_hypercall or magic & 0xFFFF_FFFF in self.magics
        return False
