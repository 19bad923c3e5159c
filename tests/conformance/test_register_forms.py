"""The two register tables of the bridge protocol, cell by cell.

`REQUEST` and `ANSWER` are the reference's own tables, word for word. Nothing that is
expected here is derived from the code under test.
"""

import re
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import (
    form_of,
    is_guest_request,
    magic_of,
    read_packet,
    write_response,
)
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import UnsupportedTrapError
from vmibridge.vm.arch.x86.instruction import decode_trap
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

REQUEST = """
| field | x64 VMCALL | x86 VMCALL | x64 CPUID | x86 CPUID |
| magic (u32) | ECX | EBP | EAX (leaf) | EAX (leaf) |
| request (u16) | EDX bits 0-15 | EDX bits 0-15 | ECX bits 0-15 (subleaf) | ECX bits 0-15 |
| method (u16) | EDX bits 16-31 | EDX bits 16-31 | ECX bits 16-31 | ECX bits 16-31 |
| value1 | R8 | ESI | R8 | EBX |
| value2 | R9 | EDI | R9 | EDX |
| value3 | R10 | none (0) | R10 | ESI |
| value4 | R11 | none (0) | R11 | EDI |
"""

ANSWER = """
| field | x64 | x86 |
| value1 | RAX | EAX |
| value2 | RBX | EBX |
| value3 | RCX | ECX |
| value4 | RDX | EDX |
"""

MASK = {64: 0xFFFF_FFFF_FFFF_FFFF, 32: 0xFFFF_FFFF, 16: 0xFFFF}

# VMMCALL is AMD's spelling of VMCALL: the same column.
COLUMN = {
    (TrapReason.VMCALL, 64): "x64 VMCALL",
    (TrapReason.VMCALL, 32): "x86 VMCALL",
    (TrapReason.VMMCALL, 64): "x64 VMCALL",
    (TrapReason.VMMCALL, 32): "x86 VMCALL",
    (TrapReason.CPUID, 64): "x64 CPUID",
    (TrapReason.CPUID, 32): "x86 CPUID",
}
FORMS = list(COLUMN)
FIELDS = ("magic", "request", "method", "value1", "value2", "value3", "value4")
REGISTERS = Registers.__struct_fields__

laws = settings(max_examples=examples(200))
u64 = st.integers(0, MASK[64])
u32 = st.integers(0, MASK[32])
u16 = st.integers(0, MASK[16])
any_registers = st.builds(Registers, **dict.fromkeys(REGISTERS, u64))
every_form = pytest.mark.parametrize(
    ("reason", "width"), FORMS, ids=[f"{reason.value}-{width}" for reason, width in FORMS]
)


class Place(NamedTuple):
    register: str
    low: int
    bits: int


def parse(table: str) -> dict[tuple[str, str], Place | None]:
    """(column, field) to the place that the reference names for it."""
    head, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()
    ]
    return {
        (column, row[0].split()[0]): place(cell)
        for row in rows
        for column, cell in zip(head[1:], row[1:], strict=True)
    }


def place(cell: str) -> Place | None:
    if cell == "none (0)":
        return None
    found = re.fullmatch(r"([RE])(\w+)(?: bits (\d+)-(\d+))?(?: \((?:sub)?leaf\))?", cell)
    assert found is not None, cell
    kind, rest, low, high = found.groups()
    first, last = (int(low), int(high)) if low else (0, 63 if kind == "R" else 31)
    return Place(f"r{rest.lower()}", first, last - first + 1)


REQUEST_PLACES = parse(REQUEST)
ANSWER_PLACES = parse(ANSWER)

every_request_cell = pytest.mark.parametrize(
    ("reason", "width", "field"),
    [
        pytest.param(reason, width, field, id=f"{reason.value}-{width}-{field}")
        for reason, width in FORMS
        for field in FIELDS
    ],
)
every_answer_cell = pytest.mark.parametrize(
    ("reason", "width", "value"),
    [
        pytest.param(reason, width, f"value{n}", id=f"{reason.value}-{width}-value{n}")
        for reason, width in FORMS
        for n in (1, 2, 3, 4)
    ],
)


def trap(reason: TrapReason, width: int, registers: Registers, **more: int) -> TrapEvent:
    return TrapEvent(1, reason, registers, width=width, **more)


def distinct_registers() -> Registers:
    """Every byte of every register is one that no other place has twice in a row."""
    return Registers(
        **{
            name: int.from_bytes(bytes((37 * n + 11 * byte + 1) & 0xFF for byte in range(8)))
            for n, name in enumerate(REGISTERS)
        }
    )


def flipped(registers: Registers, name: str, bit: int) -> Registers:
    return msgspec.structs.replace(registers, **{name: getattr(registers, name) ^ 1 << bit})


def guest_registers(reason: TrapReason, width: int, packet: BridgePacket, noise: Registers):
    """What a guest that asks for `packet` has in its registers, by the table alone."""
    values = {name: getattr(noise, name) for name in REGISTERS}
    for field in FIELDS:
        at = REQUEST_PLACES[COLUMN[reason, width], field]
        if at is not None:
            hole = ~(((1 << at.bits) - 1) << at.low)
            values[at.register] = values[at.register] & hole | getattr(packet, field) << at.low
    return Registers(**values)


def packets(reason: TrapReason, width: int) -> st.SearchStrategy[BridgePacket]:
    """The packets that a guest of this form can ask."""
    strategies = {"magic": u32, "request": u16, "method": u16}
    for field in FIELDS[3:]:
        at = REQUEST_PLACES[COLUMN[reason, width], field]
        strategies[field] = st.just(0) if at is None else st.integers(0, MASK[width])
    return st.builds(BridgePacket, **strategies)


responses = st.builds(BridgeResponse, *[st.none() | u64] * 4)


# --- a request: what the guest puts in registers ------------------------------------


def test_the_reference_names_every_cell():
    assert len(REQUEST_PLACES) == 4 * 7
    assert len(ANSWER_PLACES) == 2 * 4
    assert len({getattr(distinct_registers(), name) for name in REGISTERS}) == len(REGISTERS)


@every_request_cell
def test_a_field_is_read_from_its_register(reason, width, field):
    registers = distinct_registers()
    at = REQUEST_PLACES[COLUMN[reason, width], field]
    expected = 0
    if at is not None:
        # An x86 value is the low 32 bits of its register, zero-extended.
        expected = getattr(registers, at.register) >> at.low & (1 << at.bits) - 1
        assert expected > 0
    assert getattr(read_packet(trap(reason, width, registers)), field) == expected


@every_request_cell
def test_a_field_depends_on_exactly_its_bits(reason, width, field):
    # One flipped bit anywhere in any register: only the cell's own bits show, each in
    # its place. So every upper half, and every other register, is ignored.
    registers = distinct_registers()
    before = getattr(read_packet(trap(reason, width, registers)), field)
    at = REQUEST_PLACES[COLUMN[reason, width], field]
    for name in REGISTERS:
        for bit in range(64):
            after = getattr(read_packet(trap(reason, width, flipped(registers, name, bit))), field)
            is_ours = at is not None and name == at.register and 0 <= bit - at.low < at.bits
            assert after == (before ^ 1 << bit - at.low if is_ours else before), (name, bit)


@every_form
def test_the_magic_of_a_trap_is_the_packets_magic(reason, width):
    event = trap(reason, width, distinct_registers())
    at = REQUEST_PLACES[COLUMN[reason, width], "magic"]
    assert magic_of(event) == getattr(event.registers, at.register) & MASK[32]
    assert magic_of(event) == read_packet(event).magic


@pytest.mark.parametrize("sign", [0, 0xFFFF_FFFF], ids=["zero-extended", "sign-extended"])
def test_guests_may_differ_in_how_they_extend_the_magic(sign):
    registers = Registers(rcx=sign << 32 | 0x8249_4D56)
    assert read_packet(trap(TrapReason.VMCALL, 64, registers)).magic == 0x8249_4D56


@pytest.mark.parametrize("width", [64, 32])
def test_vmmcall_means_the_same_as_vmcall(width):
    registers = distinct_registers()
    assert read_packet(trap(TrapReason.VMMCALL, width, registers)) == read_packet(
        trap(TrapReason.VMCALL, width, registers)
    )


@laws
@given(data=st.data(), form=st.sampled_from(FORMS), noise=any_registers)
def test_what_the_guest_puts_in_is_what_the_host_reads(data, form, noise):
    packet = data.draw(packets(*form))
    assert read_packet(trap(*form, guest_registers(*form, packet, noise))) == packet


@laws
@given(
    registers=any_registers,
    reason=st.sampled_from([TrapReason.CPUID, TrapReason.VMCALL, TrapReason.VMMCALL]),
    width=st.sampled_from([64, 32, 16]),
)
def test_any_registers_at_all_make_a_packet_in_range(registers, reason, width):
    event = trap(reason, width, registers, ip=registers.rip & MASK[width], length=3)
    packet = read_packet(event)
    assert 0 <= packet.magic <= MASK[32]
    assert 0 <= packet.request <= MASK[16]
    assert 0 <= packet.method <= MASK[16]
    assert all(0 <= value <= MASK[64 if width == 64 else 32] for value in packet.values)
    assert magic_of(event) == packet.magic
    assert is_guest_request(event) in (True, False)


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("reason", [TrapReason.PORT_IO, TrapReason.MSR, TrapReason.BREAKPOINT])
def test_other_traps_carry_no_request(reason, width):
    event = trap(reason, width, distinct_registers())
    for read in (read_packet, magic_of):
        with pytest.raises(UnsupportedTrapError, match=f"a {width}-bit {reason.value} trap"):
            read(event)
    with pytest.raises(UnsupportedTrapError):
        form_of(reason, width)


@pytest.mark.parametrize("width", [0, 8, 24, 48, 57, 128, -64])
def test_an_unknown_width_has_no_form(width):
    with pytest.raises(UnsupportedTrapError):
        read_packet(trap(TrapReason.VMCALL, width, distinct_registers()))


# --- a response: what the host writes back ------------------------------------------


@every_answer_cell
def test_a_value_goes_to_its_register(reason, width, value):
    sent = 0x8877_6655_4433_2211
    writes = write_response(
        trap(reason, width, distinct_registers()), BridgeResponse(**{value: sent})
    )
    at = ANSWER_PLACES["x64" if width == 64 else "x86", value]
    expected = dict.fromkeys(("rax", "rbx", "rcx", "rdx"))  # an absent value: unchanged
    expected[at.register] = sent & (1 << at.bits) - 1
    assert {name: getattr(writes, name) for name in expected} == expected


@every_form
def test_four_values_go_to_four_registers(reason, width):
    writes = write_response(
        trap(reason, width, distinct_registers()), BridgeResponse(0x11, 0x22, 0x33, 0x44)
    )
    assert (writes.rax, writes.rbx, writes.rcx, writes.rdx) == (0x11, 0x22, 0x33, 0x44)


@every_form
def test_zero_is_a_value_and_not_an_absent_one(reason, width):
    writes = write_response(trap(reason, width, distinct_registers()), BridgeResponse(0, 0, 0, 0))
    assert writes.values == (0, 0, 0, 0)


@every_form
@pytest.mark.parametrize("response", [None, BridgeResponse(), BridgeResponse(output="kept here")])
def test_a_response_without_values_only_moves_past_the_instruction(reason, width, response):
    event = trap(reason, width, distinct_registers(), ip=0x1000, length=3)
    writes = write_response(event, response)
    assert writes.rip == 0x1003
    assert writes.values == (None, None, None, None)


@laws
@given(response=responses, form=st.sampled_from(FORMS), before=any_registers)
def test_what_the_host_answers_is_what_the_guest_sees(response, form, before):
    reason, width = form
    writes = write_response(trap(reason, width, before), response)
    for value in ("value1", "value2", "value3", "value4"):
        at = ANSWER_PLACES["x64" if width == 64 else "x86", value]
        written, sent = getattr(writes, at.register), getattr(response, value)
        seen = (getattr(before, at.register) if written is None else written) & (1 << at.bits) - 1
        kept = getattr(before, at.register) if sent is None else sent
        assert seen == kept & (1 << at.bits) - 1
        # An x86 register has no upper half to write.
        assert written is None or 0 <= written <= MASK[width]


# --- the instruction pointer --------------------------------------------------------

INSTRUCTIONS = [
    ("0F A2", TrapReason.CPUID, 2),
    ("0F 01 C1", TrapReason.VMCALL, 3),
    ("0F 01 D9", TrapReason.VMMCALL, 3),
]


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("prefixes", ["", "F3", "66 67", "2E 2E 2E"])
@pytest.mark.parametrize(("opcode", "reason", "size"), INSTRUCTIONS)
def test_the_instruction_pointer_moves_past_opcode_and_prefixes(
    opcode, reason, size, prefixes, width
):
    code = bytes.fromhex(prefixes + opcode)
    assert decode_trap(code + b"\x90" * 8, width) == (reason, len(code))
    assert len(code) == size + len(bytes.fromhex(prefixes))
    event = trap(reason, width, Registers(), ip=0x40_1000, length=len(code))
    assert write_response(event, BridgeResponse(1)).rip == 0x40_1000 + len(code)


@pytest.mark.parametrize("response", [None, BridgeResponse(1)])
@pytest.mark.parametrize(
    ("width", "ip", "rip"),
    [
        (64, 0xFFFF_FFFF_FFFF_FFFD, 0),
        (64, 0xFFFF_FFFF_FFFF_FFFF, 2),
        (64, 0xFFFF_FFFD, 0x1_0000_0000),
        (32, 0xFFFF_FFFD, 0),
        (32, 0xFFFF_FFFE, 1),
        (32, 0xFFFD, 0x1_0000),
        (16, 0xFFFD, 0),
        (16, 0xFFFF, 2),
    ],
)
def test_the_instruction_pointer_wraps_at_the_width(width, ip, rip, response):
    event = trap(TrapReason.VMCALL, width, Registers(), ip=ip, length=3)
    assert write_response(event, response).rip == rip


@laws
@given(
    width=st.sampled_from([64, 32, 16]),
    ip=u64,
    length=st.integers(2, 15),
    response=responses | st.none(),
)
def test_the_instruction_pointer_always_fits_the_width(width, ip, length, response):
    event = trap(TrapReason.CPUID, width, Registers(), ip=ip & MASK[width], length=length)
    writes = write_response(event, response)
    assert writes.rip == (event.ip + length) % (1 << width)


# --- 16-bit guests ------------------------------------------------------------------


@pytest.mark.parametrize("reason", [TrapReason.CPUID, TrapReason.VMCALL, TrapReason.VMMCALL])
def test_a_16_bit_guest_is_read_like_x86_for_the_log(reason):
    # The protocol has no form for it; whose call it was is still told.
    registers = distinct_registers()
    assert read_packet(trap(reason, 16, registers)) == read_packet(trap(reason, 32, registers))


def test_a_16_bit_guest_that_is_answered_gets_32_bit_registers_and_a_16_bit_ip():
    event = trap(TrapReason.CPUID, 16, Registers(), ip=0xFFFF, length=2)
    writes = write_response(event, BridgeResponse(value1=0x1_8000_0001))
    assert (writes.rip, writes.rax) == (1, 0x8000_0001)


# --- Xen's signature of a guest request ---------------------------------------------

XEN = {
    64: {"rax": 0x22, "rdi": 0x18, "rsi": 0},
    32: {"rax": 0x22, "rbx": 0x18, "rcx": 0},
}


@pytest.mark.parametrize("reason", [TrapReason.VMCALL, TrapReason.VMMCALL])
@pytest.mark.parametrize("width", [64, 32])
def test_xens_signature_is_a_guest_request(width, reason):
    noise = dict.fromkeys(REGISTERS, 6148914691236517205)
    assert is_guest_request(trap(reason, width, Registers(**noise | XEN[width])))


@pytest.mark.parametrize("wrong", [1 << 0, 1 << 7, 1 << 31])
@pytest.mark.parametrize(
    ("width", "register"), [(width, name) for width in XEN for name in XEN[width]]
)
def test_every_register_of_the_signature_counts(width, register, wrong):
    values = dict(XEN[width])
    values[register] ^= wrong
    assert not is_guest_request(trap(TrapReason.VMCALL, width, Registers(**values)))


@pytest.mark.parametrize(
    ("width", "register"), [(64, "rax"), (64, "rdi"), (32, "rax"), (32, "rbx"), (32, "rcx")]
)
def test_the_signature_is_read_from_the_low_32_bits(width, register):
    values = dict(XEN[width])
    values[register] |= 0xFFFF_FFFF_0000_0000
    assert is_guest_request(trap(TrapReason.VMCALL, width, Registers(**values)))


def test_rsi_is_zero_in_all_its_64_bits():
    values = XEN[64] | {"rsi": 1 << 32}
    assert not is_guest_request(trap(TrapReason.VMCALL, 64, Registers(**values)))


@pytest.mark.parametrize(("width", "other"), [(64, 32), (32, 64)])
def test_the_signature_of_the_other_width_is_none(width, other):
    assert not is_guest_request(trap(TrapReason.VMCALL, width, Registers(**XEN[other], rbp=1)))
