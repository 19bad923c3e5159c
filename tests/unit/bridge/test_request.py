"""What a trap asks, and whether it is ours to answer."""

import msgspec
import pytest

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import own_request, request_in, retry_key, why_native
from vmibridge.vm.trap import Registers, TrapEvent, TrapFilter, TrapReason

MAGIC = 0x4249_4D56
OURS = TrapFilter(frozenset({MAGIC}))
X64 = {"rcx": MAGIC, "rdx": 3 << 16 | 2, "r8": 8, "r9": 9, "r10": 10, "r11": 11}
XEN = {"rax": 0x22, "rdi": 0x18, "rsi": 0}
"""`__HYPERVISOR_hvm_op` and `HVMOP_guest_request_vm_event` (Xen, `xen.h` and `hvm/hvm_op.h`)."""


def trap(reason=TrapReason.VMCALL, *, ring=3, width=64, **registers):
    return TrapEvent(7, reason, Registers(**{"cr3": 0x5000, **registers}), width=width, ring=ring)


def is_ours(event, traps, *, other_hypercalls):
    return own_request(event, traps, other_hypercalls=other_hypercalls) is not None


def test_the_request_is_the_packet_in_the_registers():
    assert request_in(trap(**X64)) == BridgePacket(MAGIC, 2, 3, 8, 9, 10, 11)


@pytest.mark.parametrize("reason", [TrapReason.PORT_IO, TrapReason.MSR, TrapReason.BREAKPOINT])
def test_a_trap_that_carries_no_request_has_none_and_is_not_ours(reason):
    event = trap(reason, **X64)
    assert request_in(event) is None
    assert not is_ours(event, TrapFilter(any_hypercall=True), other_hypercalls=False)


@pytest.mark.parametrize("wrong", [{"r8": -1}, {"r9": 1 << 64}], ids=["negative", "65 bits"])
def test_registers_that_no_machine_has_are_no_request_and_not_ours(wrong):
    event = trap(**X64 | wrong)
    assert request_in(event) is None
    assert not is_ours(event, OURS, other_hypercalls=False)


@pytest.mark.parametrize("reason", [TrapReason.VMCALL, TrapReason.VMMCALL])
@pytest.mark.parametrize("other_hypercalls", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("magic", [MAGIC, MAGIC + 1])
def test_a_hypercall_is_ours_by_its_magic_and_where_there_are_others_by_the_signature(
    reason, other_hypercalls, signed, magic
):
    event = trap(reason, **X64 | (XEN if signed else {}) | {"rcx": magic})
    ours = magic == MAGIC and (signed or not other_hypercalls)
    assert is_ours(event, OURS, other_hypercalls=other_hypercalls) is ours


@pytest.mark.parametrize("other_hypercalls", [False, True])
@pytest.mark.parametrize("magic", [MAGIC, MAGIC + 1])
def test_a_cpuid_is_ours_by_its_magic_alone(other_hypercalls, magic):
    event = trap(TrapReason.CPUID, rax=magic)
    assert is_ours(event, OURS, other_hypercalls=other_hypercalls) is (magic == MAGIC)


def test_the_signature_is_not_enough_where_the_filter_does_not_want_the_trap():
    assert not is_ours(trap(**X64 | XEN), TrapFilter(), other_hypercalls=True)


def test_a_request_that_is_ours_is_given():
    packet = own_request(trap(**X64), OURS, other_hypercalls=False)
    assert packet == BridgePacket(MAGIC, 2, 3, 8, 9, 10, 11)


@pytest.mark.parametrize("same", [{"r8": 1}, {"r11": 1}, {"rip": 0x1234}], ids=str)
def test_a_retry_may_have_other_values(same):
    first, again = trap(**X64), trap(**X64 | same)
    assert retry_key(first, request_in(first)) == retry_key(again, request_in(again))


@pytest.mark.parametrize(
    "other",
    [{"cr3": 0x6000}, {"ring": 0}, {"rcx": MAGIC + 1}, {"rdx": 3 << 16 | 1}, {"rdx": 2 << 16 | 2}],
    ids=["address space", "ring", "magic", "request", "method"],
)
def test_what_is_never_a_retry(other):
    first, second = trap(**X64), trap(**X64 | other)
    assert retry_key(first, request_in(first)) != retry_key(second, request_in(second))


def test_the_key_does_not_depend_on_the_number_of_the_trap():
    first = trap(**X64)
    again = msgspec.structs.replace(first, seq=8, vcpu=1)
    assert retry_key(first, request_in(first)) == retry_key(again, request_in(again))


@pytest.mark.parametrize(
    ("event", "other_hypercalls", "why"),
    [
        (trap(TrapReason.PORT_IO, **X64), False, "no request"),
        (trap(**X64 | {"r8": -1}), False, "no request"),
        (trap(**X64 | {"rcx": MAGIC + 1}), False, "another magic"),
        (trap(**X64 | XEN | {"rcx": MAGIC + 1}), True, "another magic"),
        (trap(TrapReason.CPUID, rax=MAGIC + 1), True, "another magic"),
        (trap(**X64), True, "no signature"),
    ],
)
def test_why_a_trap_is_not_ours(event, other_hypercalls, why):
    assert not is_ours(event, OURS, other_hypercalls=other_hypercalls)
    assert why_native(event, OURS) == why
