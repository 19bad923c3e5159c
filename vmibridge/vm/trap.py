"""A trap: what a backend saw, and what it is to write back.

The vCPU stands still between the two.
"""

from typing import Any

import msgspec

from vmibridge.vm.arch import architecture_of
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.registers import Registers
from vmibridge.vm.reason import TrapReason

__all__ = ["RegisterWrites", "Registers", "TrapEvent", "TrapFilter", "TrapReason"]


# Asking an Enum for a member takes as long as a call before Python 3.12.
_CPUID = TrapReason.CPUID
_DEVICE = TrapReason.DEVICE
_CALLS = frozenset((TrapReason.VMCALL, TrapReason.VMMCALL, TrapReason.DEVICE))


class TrapEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
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
    flags_known: bool = True
    """Whether `registers.rflags` has the arithmetic flags and DF as they were at the trap.

    A QEMU that exports none of its own functions does not show them to the plugin; all other
    flags, and all flags of other backends, are always known.
    """

    @property
    def architecture(self) -> Architecture[Any]:
        """The architecture of the guest, which is that of its registers."""
        return architecture_of(self.registers)

    @property
    def address_space(self) -> int:
        """The physical address of the root of the page tables, which names the address space.

        Which bits those are is said by the architecture, for x86 in
        `vmibridge.vm.arch.x86.registers.page_root`.
        """
        registers = self.registers
        return architecture_of(registers).page_root(registers)

    @property
    def caller(self) -> int:
        """What tells callers apart: the address space, or of a call by a device its slot.

        Most calls by a device have no address space, and a slot is one caller's. It is `~vcpu`,
        which no address space is.
        """
        return ~self.vcpu if self.reason is _DEVICE else self.address_space


class RegisterWrites(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What goes back into the vCPU; `None` leaves a register as it was.

    `rip` moves past the trapping instruction, so that it does not run natively. The names are those
    of x86, which handlers and recordings rely on: another architecture has its instruction pointer
    in `rip`, and value1 to value4 in the others.
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
    """A handler without magic makes every VMCALL, VMMCALL and call by a device ours."""
    any_cpuid: bool = False
    """The same for CPUID, which takes an explicit opt-in."""

    def wants(self, reason: TrapReason, magic: int) -> bool:
        """Whether a trap with this magic (its low 32 bits) is ours."""
        if reason is _CPUID:
            return self.any_cpuid or magic & 0xFFFF_FFFF in self.magics
        if reason in _CALLS:
            return self.any_hypercall or magic & 0xFFFF_FFFF in self.magics
        return False

    def covers(self, other: "TrapFilter") -> bool:
        """Whether each trap that `other` wants is wanted by this one, too."""
        takes_all = self.any_hypercall and self.any_cpuid
        return (
            (takes_all or other.magics <= self.magics)
            and self.any_hypercall >= other.any_hypercall
            and self.any_cpuid >= other.any_cpuid
        )
