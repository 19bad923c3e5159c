"""Registers to packet, response to registers, by the register forms of an architecture.

Which register has which field of a request stands in `vmibridge.vm.arch`, for x86 in
`vm/arch/x86/forms.py`. value1 to value4 of the answer go to the registers of `RegisterWrites`: on
x86 RAX, RBX, RCX, RDX (32-bit guests: EAX to EDX, the low 32 bits).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import UnsupportedTrapError
from vmibridge.vm.arch import ARCHITECTURES
from vmibridge.vm.arch.architecture import Architecture, RegisterForm
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapReason

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def forms_of(
    architectures: Iterable[Architecture[Any]],
) -> Mapping[tuple[TrapReason, int], RegisterForm]:
    """The register forms of these, by trap instruction and address width.

    One table for all, since a trap instruction is one of a single architecture: the way of every
    trap has one look-up, and does not ask for its architecture. Raises `ValueError` where two
    architectures have one instruction.
    """
    found: dict[tuple[TrapReason, int], RegisterForm] = {}
    owners: dict[TrapReason, str] = {}
    for architecture in architectures:
        for (reason, width), form in architecture.forms.items():
            if owners.setdefault(reason, architecture.name) != architecture.name:
                raise ValueError(
                    f"{reason.value} is of {owners[reason]} and of {architecture.name}"
                )
            # The newest version is first.
            found.setdefault((reason, width), form)
    return found


_FORMS = forms_of(ARCHITECTURES)


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
    _, mask, get = _FORMS.get((event.reason, event.width)) or form_of(event.reason, event.width)
    fields = get(event.registers)
    if mask == _MASK64 and len(fields) == 6:
        # All values, as they are: without a list of them, which would cost as much as the rest.
        magic, code, value1, value2, value3, value4 = fields
        request, method = code & 0xFFFF, code >> 16 & 0xFFFF
        return BridgePacket(magic & _MASK32, request, method, value1, value2, value3, value4)
    magic, selector, *values = fields
    return BridgePacket(
        magic & _MASK32,
        selector & 0xFFFF,
        selector >> 16 & 0xFFFF,
        *(values if mask == _MASK64 else [value & mask for value in values]),
    )


def write_response(event: TrapEvent, response: BridgeResponse[object] | None) -> RegisterWrites:
    """The register writes that answer a trap; `None` only moves past the instruction."""
    if event.width == 64:
        ip = event.ip + event.length & _MASK64
        if response is None:
            return RegisterWrites(ip)
        return RegisterWrites(
            ip, response.value1, response.value2, response.value3, response.value4
        )
    ip = event.ip + event.length & (1 << event.width) - 1
    if response is None:
        return RegisterWrites(ip)
    form = _FORMS.get((event.reason, event.width))
    mask = _MASK32 if form is None else form.mask
    return RegisterWrites(
        ip, *[None if value is None else value & mask for value in response.values]
    )


def is_guest_request(event: TrapEvent) -> bool:
    """Whether a hypercall has the signature of Xen's guest request.

    A hypervisor that has hypercalls of its own lets only these through to a bridge. What the
    signature is, is said by the architecture.
    """
    return event.architecture.is_guest_request(event.registers, event.width)
