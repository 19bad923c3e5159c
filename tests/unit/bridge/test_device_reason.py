"""A call by a device is a request like any other: its registers, whose it is, who may ask again."""

import pytest

from vmibridge.bridge.registers import form_of, read_packet, write_response
from vmibridge.bridge.request import own_request, retry_key
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import UnsupportedTrapError
from vmibridge.transport.wire import trap_event, trap_frame
from vmibridge.vm.spec import parse_duration
from vmibridge.vm.trap import Registers, TrapEvent, TrapFilter, TrapReason

MAGIC = 0x42494D56
OURS = TrapFilter(magics=frozenset({MAGIC}))
REGISTERS = Registers(rcx=MAGIC, rdx=0x2_0007, r8=1 << 32 | 1, r9=2, r10=3, r11=4)


def event(**given):
    return TrapEvent(1, TrapReason.DEVICE, REGISTERS, **{"vcpu": 5, "ring": 3, **given})


@pytest.mark.parametrize(("width", "value1"), [(64, 1 << 32 | 1), (32, 1)])
def test_its_fields_are_in_the_registers_of_a_64_bit_vmcall(width, value1):
    packet = read_packet(event(width=width))
    assert (packet.magic, packet.request, packet.method) == (MAGIC, 7, 2)
    assert packet.values == (value1, 2, 3, 4)
    writes = write_response(event(width=width), BridgeResponse(1 << 40 | 9, None, 8))
    assert writes.values == (1 << 40 | 9 if width == 64 else 9, None, 8, None)
    assert writes.rip == 0


def test_a_16_bit_caller_has_no_form():
    with pytest.raises(UnsupportedTrapError):
        form_of(TrapReason.DEVICE, 16)


def test_it_is_ours_by_its_magic_or_where_any_hypercall_is():
    assert OURS.wants(TrapReason.DEVICE, MAGIC)
    assert not OURS.wants(TrapReason.DEVICE, 1)
    assert TrapFilter(any_hypercall=True).wants(TrapReason.DEVICE, 1)
    assert not TrapFilter(any_cpuid=True).wants(TrapReason.DEVICE, 1)


def test_it_needs_no_signature_of_a_hypercall():
    assert own_request(event(), OURS, other_hypercalls=True) is not None


def test_a_retry_comes_by_the_same_slot():
    packet = read_packet(event())
    assert retry_key(event(), packet) == retry_key(event(), packet)
    assert retry_key(event(), packet) != retry_key(event(vcpu=6), packet)
    space = TrapEvent(1, TrapReason.VMCALL, REGISTERS, vcpu=5, ring=3)
    assert retry_key(event(vcpu=0), packet) != retry_key(space, packet)


def test_its_caller_is_its_slot_and_that_of_others_their_address_space():
    registers = Registers(rcx=MAGIC, cr3=0x5000)
    assert TrapEvent(1, TrapReason.VMCALL, registers, vcpu=5).caller == 0x5000
    assert TrapEvent(1, TrapReason.DEVICE, registers, vcpu=5).caller == ~5


def test_it_travels():
    assert trap_event(trap_frame(event(), 1000), "vm") == event()


@pytest.mark.parametrize(
    ("text", "seconds"), [("2ms", 0.002), ("250us", 0.00025), ("1.5s", 1.5), ("3", 3.0), ("0", 0.0)]
)
def test_a_duration_is_in_seconds(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1m", "1e3", "inf", "1 s", "9" * 20])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
