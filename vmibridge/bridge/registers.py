"""Registers to packet, response to registers: the four forms of a request.

| field | x64 VMCALL | x86 VMCALL | x64 CPUID | x86 CPUID |
|---|---|---|---|---|
| magic | ECX | EBP | EAX | EAX |
| request, method | EDX | EDX | ECX | ECX |
| value1 | R8 | ESI | R8 | EBX |
| value2 | R9 | EDI | R9 | EDX |
| value3 | R10 | 0 | R10 | ESI |
| value4 | R11 | 0 | R11 | EDI |

The request is bits 0-15 of its register, the method bits 16-31. VMMCALL is VMCALL.
value1 to value4 of the answer go to RAX, RBX, RCX, RDX (x86: EAX to EDX, the low 32
bits). x64 or x86 is decided by the effective address width at the trap. Source:
vmi-utils 0.4 to 0.12, module `bridge`.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import UnsupportedTrapError
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

XEN_HVM_OP = 0x22
"""`__HYPERVISOR_hvm_op`, in EAX."""
XEN_GUEST_REQUEST = 0x18
"""`HVMOP_guest_request_vm_event`, in EDI (x64) or EBX (x86)."""


class RegisterForm(NamedTuple):
    """Where one kind of guest keeps the fields of a request."""

    names: tuple[str, ...]
    """magic, request and method, value1 to as many values as the form has."""
    mask: int
    """The bits that a value of this form has."""
    get: Callable[[Registers], tuple[int, ...]]


def _form(mask: int, *names: str) -> RegisterForm:
    return RegisterForm(names, mask, attrgetter(*names))


_X64_VMCALL = _form(_MASK64, "rcx", "rdx", "r8", "r9", "r10", "r11")
_X86_VMCALL = _form(_MASK32, "rbp", "rdx", "rsi", "rdi")
_X64_CPUID = _form(_MASK64, "rax", "rcx", "r8", "r9", "r10", "r11")
_X86_CPUID = _form(_MASK32, "rax", "rcx", "rbx", "rdx", "rsi", "rdi")

# A 16-bit guest has no form of its own; it is read like x86 to tell whose call it is.
_FORMS = {
    (reason, width): form
    for reason, x64, x86 in (
        (TrapReason.CPUID, _X64_CPUID, _X86_CPUID),
        (TrapReason.VMCALL, _X64_VMCALL, _X86_VMCALL),
        (TrapReason.VMMCALL, _X64_VMCALL, _X86_VMCALL),
    )
    for width, form in ((64, x64), (32, x86), (16, x86))
}


def form_of(reason: TrapReason, width: int) -> RegisterForm:
    """The form of a trap at an address width in bits.

    Raises `UnsupportedTrapError` for a trap that carries no request.
    """
    try:
        return _FORMS[reason, width]
    except KeyError:
        raise UnsupportedTrapError(
            f"a {width}-bit {reason.value} trap carries no request"
        ) from None


def magic_of(event: TrapEvent) -> int:
    """The 32 bits where this trap's form keeps the magic. Raises `UnsupportedTrapError`."""
    form = form_of(event.reason, event.width)
    return form.get(event.registers)[0] & _MASK32


def read_packet(event: TrapEvent) -> BridgePacket:
    """Decode the request; upper halves that the form does not use are ignored.

    Of a 16-bit guest this is a best reading, for the log. Raises
    `UnsupportedTrapError` for a trap that carries no request.
    """
    form = _FORMS.get((event.reason, event.width)) or form_of(event.reason, event.width)
    magic, selector, *values = form.get(event.registers)
    mask = form.mask
    if mask == _MASK64:
        return BridgePacket(magic & _MASK32, selector & 0xFFFF, selector >> 16 & 0xFFFF, *values)
    return BridgePacket(
        magic & _MASK32,
        selector & 0xFFFF,
        selector >> 16 & 0xFFFF,
        *[value & mask for value in values],
    )


def write_response(event: TrapEvent, response: BridgeResponse[object] | None) -> RegisterWrites:
    """The register writes that answer a trap; `None` only moves past the instruction."""
    if event.width == 64:
        rip = event.ip + event.length & _MASK64
        if response is None:
            return RegisterWrites(rip)
        return RegisterWrites(
            rip, response.value1, response.value2, response.value3, response.value4
        )
    rip = event.ip + event.length & (_MASK32 if event.width == 32 else 0xFFFF)
    if response is None:
        return RegisterWrites(rip)
    return RegisterWrites(
        rip, *[None if value is None else value & _MASK32 for value in response.values]
    )


def is_guest_request(event: TrapEvent) -> bool:
    """Whether a VMCALL has the signature of Xen's guest request.

    A hypervisor that has hypercalls of its own lets only these through to a bridge:
    EAX is `__HYPERVISOR_hvm_op`; then x64 has EDI `HVMOP_guest_request_vm_event`
    and RSI 0, x86 has EBX and ECX. Source: Xen public headers `xen.h`, `hvm/hvm_op.h`.
    """
    registers = event.registers
    if registers.rax & _MASK32 != XEN_HVM_OP:
        return False
    if event.width == 64:
        return registers.rdi & _MASK32 == XEN_GUEST_REQUEST and registers.rsi == 0
    return registers.rbx & _MASK32 == XEN_GUEST_REQUEST and registers.rcx & _MASK32 == 0
