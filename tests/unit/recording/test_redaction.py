"""What a trap keeps where values are left out."""

import msgspec
import pytest

from vmibridge import Registers, TrapEvent, TrapReason
from vmibridge.bridge.registers import read_packet
from vmibridge.errors import ConfigError
from vmibridge.recording.redaction import Redaction

GENERAL = [
    *["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"],
    *(f"r{number}" for number in range(8, 16)),
]
FORMS = [
    pytest.param(reason, width, id=f"{reason.value}-{width}")
    for reason in (TrapReason.VMCALL, TrapReason.VMMCALL, TrapReason.CPUID)
    for width in (64, 32)
]


def trap(reason, width):
    registers = Registers(**{name: 0x100 + place for place, name in enumerate(GENERAL)}, cr3=0x7000)
    return TrapEvent(1, reason, registers, ip=0x1000, length=3, width=width)


@pytest.mark.parametrize(("reason", "width"), FORMS)
def test_only_what_a_request_asks_stays_when_any_value_is_left_out(reason, width):
    event = trap(reason, width)
    asked = read_packet(event)
    other = Redaction(["0xfff0:value2"]).trap(event, frozenset())
    assert read_packet(other) == asked
    kept = [name for name in GENERAL if getattr(other.registers, name)]
    known = {asked.magic, asked.request | asked.method << 16, *asked.values}
    assert {getattr(event.registers, name) for name in kept} <= known
    assert other.registers.cr3 == 0x7000


@pytest.mark.parametrize(("reason", "width"), FORMS)
def test_the_value_itself_is_gone(reason, width):
    event = trap(reason, width)
    redaction = Redaction(["value2"])
    asked = read_packet(event)
    left = redaction.trap(event, redaction.of(asked.request))
    assert read_packet(left) == msgspec.structs.replace(asked, value2=0)
    assert asked.value2 not in msgspec.structs.astuple(left.registers)


def test_a_rule_for_memory_leaves_registers_alone():
    event = trap(TrapReason.VMCALL, 64)
    redaction = Redaction(["memory"])
    assert redaction.trap(event, redaction.of(0x101)) == event


@pytest.mark.parametrize(
    "rule", ["", "value5", "0x10000:memory", "memory:1", "65536:value1", "all"]
)
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ConfigError, match="is not a redaction"):
        Redaction([rule])
