"""Where the registers are in a `g` packet."""

import struct

import pytest

from vmibridge.backends.qemu.gdb.commands import ReplyError
from vmibridge.backends.qemu.gdb.registers import (
    MAX_DESCRIPTION,
    QEMU_X86_64,
    Field,
    Frame,
    layout_of,
    parse_description,
    parse_frame,
)
from vmibridge.vm.trap import Registers, RegisterWrites

NAMES_64 = [
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{number}" for number in range(8, 16)),
    "rip",
]
SEGMENTS = ["cs", "ss", "ds", "es", "fs", "gs"]
BASES = ["fs_base", "gs_base", "k_gs_base"]
CONTROL = ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"]
NAMES_32 = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip"]


def described(registers, begin="", end=""):
    lines = [f'<reg name="{name}" bitsize="{bits}"/>' for name, bits in registers]
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">'
        f"<target>{begin}<feature>{''.join(lines)}</feature>{end}</target>"
    ).encode()


def wide():
    registers = [(name, 64) for name in NAMES_64]
    registers += [(name, 32) for name in ["eflags", *SEGMENTS]]
    return registers + [(name, 64) for name in BASES + CONTROL]


def narrow():
    registers = [(name, 32) for name in NAMES_32]
    registers += [(name, 32) for name in ["eflags", *SEGMENTS, *BASES, *CONTROL[:-1]]]
    return [*registers, ("efer", 64)]


def values_of(registers):
    """A packet in which each register has its own number, counted from 1, as value."""
    sizes = {32: "I", 64: "Q"}
    layout = "<" + "".join(sizes[bits] for _, bits in registers)
    return struct.pack(layout, *range(1, len(registers) + 1))


def test_the_layout_of_qemu_is_that_of_its_description():
    layout = layout_of([parse_description(described(wide()))])
    for name in (*NAMES_64, "eflags", *SEGMENTS, *BASES, *CONTROL):
        assert layout.fields[name] == QEMU_X86_64.fields[name]
    places = {"rip": 128, "eflags": 136, "cs": 140, "fs_base": 164, "cr0": 188, "efer": 228}
    assert {name: layout.fields[name].offset for name in places} == places
    assert (layout.size, layout.is_wide, layout.has_control) == (236, True, True)


def test_registers_are_read():
    names = [name for name, _ in wide()]
    registers, cs = QEMU_X86_64.read(values_of(wide()) + bytes(372))
    assert cs == names.index("cs") + 1
    for name in Registers.__struct_fields__:
        own = {"rflags": "eflags"}.get(name, name)
        assert getattr(registers, name) == names.index(own) + 1


def test_registers_of_a_32_bit_vcpu_are_read():
    layout = layout_of([parse_description(described(narrow()))])
    names = [name for name, _ in narrow()]
    registers, cs = layout.read(values_of(narrow()))
    assert (layout.is_wide, layout.has_control, cs) == (False, True, names.index("cs") + 1)
    assert (registers.rax, registers.rbx, registers.rip) == (1, 4, 9)
    assert (registers.r8, registers.efer) == (0, names.index("efer") + 1)


def test_a_write_ends_behind_the_instruction_pointer():
    before = values_of(wide()) + bytes(372)
    after = QEMU_X86_64.write(before, RegisterWrites(0x1234, rax=(1 << 64) - 1, rdx=7))
    assert len(after) == 136
    registers, _ = QEMU_X86_64.read(after + before[136:])
    assert (registers.rax, registers.rbx, registers.rcx) == ((1 << 64) - 1, 2, 3)
    assert (registers.rdx, registers.rip, registers.r15) == (7, 0x1234, 16)


def test_a_write_of_32_bits_is_cut_to_them():
    layout = layout_of([parse_description(described(narrow()))])
    after = layout.write(values_of(narrow()), RegisterWrites(0x1_0000_0004, rbx=(1 << 64) - 1))
    assert after == struct.pack("<9I", 1, 2, 3, 0xFFFF_FFFF, 5, 6, 7, 8, 4)


def test_the_way_back_from_an_exception():
    frame = parse_frame(struct.pack("<5Q", 1, 0x33, 0x246, 0x7FFF_0000, 0x2B))
    assert frame == Frame(1, 0x33, 0x246, 0x7FFF_0000, 0x2B)
    before = values_of(wide())
    after = QEMU_X86_64.write_frame(before, RegisterWrites(0x40_0003, rax=9), frame)
    assert len(after) == 148
    registers, cs = QEMU_X86_64.read(after + before[148:])
    assert (registers.rip, registers.rsp, registers.rflags) == (0x40_0003, 0x7FFF_0000, 0x246)
    assert (registers.rax, registers.rbx, cs) == (9, 2, 0x33)
    assert struct.unpack_from("<I", after, 144) == (0x2B,)


def test_a_short_packet_is_an_error():
    with pytest.raises(ReplyError, match="235 bytes, and 236"):
        QEMU_X86_64.read(bytes(235))


def test_numbers_decide_about_the_order_and_includes_are_named():
    first = parse_description(
        b'<target><architecture> i386:x86-64 </architecture><xi:include href="a.xml"/></target>'
    )
    assert (first.architecture, first.registers, first.includes) == ("i386:x86-64", [], ["a.xml"])
    swapped = described(wide()).replace(b'"rip" bitsize="64"', b'"rip" bitsize="64" regnum="90"')
    with_number = parse_description(swapped)
    assert ("rip", 64, 90) in with_number.registers
    layout = layout_of([first, with_number])
    # What comes behind it counts on.
    assert layout.fields["rip"] == Field(128, 8)
    assert layout.fields["eflags"] == Field(136, 4)


ENTITY = '<!DOCTYPE target [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
EXTERNAL = '<!DOCTYPE target [<!ENTITY a SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (b"<target>", "no XML"),
        (b"what", "no XML"),
        (b" " * (MAX_DESCRIPTION + 1), "bytes"),
        (f"{ENTITY}<target>&b;</target>".encode(), "entities"),
        (f"{EXTERNAL}<target>&a;</target>".encode(), "entities"),
        (b'<t><reg name="a"/></t>', "without a size"),
        (b'<t><reg name="a" bitsize="x"/></t>', "without a size"),
        (b'<t><reg name="a" bitsize="7"/></t>', "7 bits"),
        (b'<t><reg name="a" bitsize="80000"/></t>', "80000 bits"),
        (b'<t><reg name="a" bitsize="8" regnum="-1"/></t>', "number -1"),
        (described([("a", 8)] * 1025), "1025 registers"),
    ],
)
def test_a_description_that_makes_no_sense(document, why):
    with pytest.raises(ReplyError, match=why):
        parse_description(document)


def test_a_layout_that_makes_no_sense():
    twice = parse_description(
        b'<t><reg name="a" bitsize="8" regnum="1"/><reg name="b" bitsize="8" regnum="1"/></t>'
    )
    with pytest.raises(ReplyError, match="a and b have one number"):
        layout_of([twice])
    with pytest.raises(ReplyError, match="a vCPU without cs"):
        layout_of([parse_description(described([r for r in wide() if r[0] != "cs"]))])
    odd = [(name, 80 if name == "rbx" else bits) for name, bits in wide()]
    with pytest.raises(ReplyError, match="register rbx of 10 bytes"):
        layout_of([parse_description(described(odd))])
    bare = [r for r in wide() if r[0] not in CONTROL]
    assert not layout_of([parse_description(described(bare))]).has_control
