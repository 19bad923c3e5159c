"""Where an x86 guest keeps the fields of a request.

| field | x64 VMCALL | x86 VMCALL | x64 CPUID | x86 CPUID |
|---|---|---|---|---|
| magic | ECX | EBP | EAX | EAX |
| request, method | EDX | EDX | ECX | ECX |
| value1 | R8 | ESI | R8 | EBX |
| value2 | R9 | EDI | R9 | EDX |
| value3 | R10 | 0 | R10 | ESI |
| value4 | R11 | 0 | R11 | EDI |

The request is bits 0-15 of its register, the method bits 16-31. VMMCALL is VMCALL. x64 or x86 is
decided by the effective address width at the trap. A call by a device has the registers of x64
VMCALL, of which a 32-bit caller has the low halves. Source: vmi-utils 0.4 to 0.12, module `bridge`.

Xen's ABI of hypercalls has the other registers: EAX, EDI and RSI on x64, EAX, EBX and ECX on x86.
So an x86 VMCALL has two values only.
"""

from collections.abc import Mapping
from types import MappingProxyType

from vmibridge.vm.arch.architecture import RegisterForm, register_form
from vmibridge.vm.arch.x86.registers import Registers
from vmibridge.vm.reason import TrapReason

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

XEN_HVM_OP = 0x22
"""`__HYPERVISOR_hvm_op`, in EAX."""
XEN_GUEST_REQUEST = 0x18
"""`HVMOP_guest_request_vm_event`, in EDI (x64) or EBX (x86)."""

_X64_VMCALL = register_form(_MASK64, "rcx", "rdx", "r8", "r9", "r10", "r11")
_X86_VMCALL = register_form(_MASK32, "rbp", "rdx", "rsi", "rdi")
_X86_DEVICE = register_form(_MASK32, "rcx", "rdx", "r8", "r9", "r10", "r11")
_X64_CPUID = register_form(_MASK64, "rax", "rcx", "r8", "r9", "r10", "r11")
_X86_CPUID = register_form(_MASK32, "rax", "rcx", "rbx", "rdx", "rsi", "rdi")

# A 16-bit guest has no form of its own; it is read like x86 to tell whose call it is.
FORMS: Mapping[tuple[TrapReason, int], RegisterForm] = MappingProxyType(
    {
        (reason, width): form
        for reason, x64, x86 in (
            (TrapReason.CPUID, _X64_CPUID, _X86_CPUID),
            (TrapReason.VMCALL, _X64_VMCALL, _X86_VMCALL),
            (TrapReason.VMMCALL, _X64_VMCALL, _X86_VMCALL),
        )
        for width, form in ((64, x64), (32, x86), (16, x86))
    }
    | {(TrapReason.DEVICE, 64): _X64_VMCALL, (TrapReason.DEVICE, 32): _X86_DEVICE}
)


def is_guest_request(registers: Registers, width: int) -> bool:
    """Whether a VMCALL has the signature of Xen's guest request.

    EAX is `__HYPERVISOR_hvm_op`; then x64 has EDI `HVMOP_guest_request_vm_event` and RSI 0, x86 has
    EBX and ECX. Source: Xen public headers `xen.h`, `hvm/hvm_op.h`.
    """
    if registers.rax & _MASK32 != XEN_HVM_OP:
        return False
    if width == 64:
        return registers.rdi & _MASK32 == XEN_GUEST_REQUEST and registers.rsi == 0
    return registers.rbx & _MASK32 == XEN_GUEST_REQUEST and registers.rcx & _MASK32 == 0
