"""The bytes between the QEMU plugin and its host, as the C structs of the plugin have them."""

import contextlib
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.backends.qemu.plugin import protocol
from vmibridge.backends.qemu.plugin.protocol import REGISTER_NAMES, FrameReader, FrameType, Hello
from vmibridge.vm.memory import MAX_ACCESS
from vmibridge.vm.trap import RegisterWrites, TrapFilter, TrapReason

SOURCE = Path(protocol.__file__).with_name("plugin").joinpath("protocol.h").read_text()
NAMES = tuple(re.findall(r'"(\w+)"', re.search(r"NAMES\[\] = \{([^}]*)\}", SOURCE)[1]))
HEAD = struct.pack("<IIQII16s12sI", 3, 7, 1 << 63, 3, 4, b"x86_64", b"x86", 1)
HELLO = HEAD + ",".join(NAMES).encode()
TRAP = {"ip": 0x4000_0000_1234, "kind": 2, "length": 3, "width": 64, "ring": 3}


def trap(flags=1, **other):
    return struct.pack("<QBBBBI22Q", *(TRAP | other).values(), flags, *range(100, 122))


def c_numbers():
    """The enums of protocol.h; a member without a number goes on from the one before."""
    numbers = {}
    for body in re.findall(r"enum \{([^}]*)\};", SOURCE):
        number = -1
        for name, base, shift in re.findall(r"(\w+)(?: = (\w+)(?: << (\d+))?)?", body):
            if base != "sizeof":
                number = int(base) << int(shift or 0) if base else number + 1
                numbers[name] = number
    return numbers


def c_struct(name):
    """A struct of protocol.h in the letters of Python's `struct`."""
    letters = {"uint64_t": "Q", "uint32_t": "I", "uint8_t": "B", "char": "s"}
    body = re.search(rf"\nstruct {name} \{{(.*?)\}};", SOURCE, re.DOTALL)[1]
    return "".join(
        count.replace("REGISTERS", str(len(NAMES))) + letters[kind]
        for kind, fields in re.findall(r"(\w+) ([^;]+);", body)
        for count in re.findall(r"\w+(?:\[(\w+)\])?", fields)
    )


SIZES = {"frame": 8, "hello": 56, "trap": 192, "answer": 48, "access": 16, "welcome": 16}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_both_ends_have_the_same_structs_and_the_compiler_pads_none(name, size):
    form, head = c_struct(name), "II" if name in ("answer", "access") else ""
    assert getattr(protocol, f"_{name.upper()}").format == f"<{head}{form}"
    assert struct.calcsize("<" + form) == struct.calcsize(form) == size


def test_both_ends_have_the_same_numbers_and_names():
    numbers = c_numbers()
    assert {each.name: numbers[each.name] for each in FrameType} == dict(FrameType.__members__)
    assert {numbers[each.name]: each for each in protocol._REASONS.values()} == protocol._REASONS
    ours = (protocol.PROTOCOL, protocol.MAX_MAGICS, MAX_ACCESS, 1, 2)
    names = ("PROTOCOL", "MAX_MAGICS", "MAX_ACCESS", "ANY_HYPERCALL", "ANY_CPUID")
    assert numbers["FLAGS_UNKNOWN"] == protocol._FLAGS_UNKNOWN
    assert tuple(numbers[name] for name in names) == ours
    assert NAMES == REGISTER_NAMES
    assert "REGISTERS = sizeof NAMES / sizeof *NAMES" in SOURCE
    for name in ("rax", "rbx", "rcx", "rdx", "rbp", "eflags", "cr0", "cr3", "cr4", "efer", "cs"):
        assert NAMES[numbers[name.upper()]] == name


@given(st.data())
def test_frames_come_whole_however_the_stream_is_cut(data):
    frames = data.draw(st.lists(st.tuples(st.integers(0, 0xFFFF_FFFF), st.binary(max_size=50))))
    stream = b"".join(struct.pack("<II", kind, len(body)) + body for kind, body in frames)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    reader, found = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        found += iter(reader.next, None)
    assert found == frames


@pytest.mark.parametrize("most", [protocol.MAX_HELLO, MAX_ACCESS])
def test_a_frame_that_is_too_long_is_refused_by_its_head(most):
    longest, too_long = FrameReader(most), FrameReader(most)
    longest.feed(struct.pack("<II", 3, most))
    assert longest.next() is None
    too_long.feed(struct.pack("<II", 3, most + 1))
    with pytest.raises(ValueError, match=f"a frame of {most + 1} bytes"):
        too_long.next()


def test_a_hello():
    hello = protocol.parse_hello(HELLO)
    assert hello == Hello(3, 7, 1 << 63, 3, 4, "x86_64", REGISTER_NAMES, "x86", 1)
    assert protocol.check_hello(hello) is None


@pytest.mark.parametrize("names", [b"", b"\xff", HELLO[56:-1], HELLO[56:] + b",ds", b"rbx,rax"])
def test_a_plugin_with_other_registers_or_another_protocol_is_not_served(names):
    assert "other registers" in protocol.check_hello(protocol.parse_hello(HEAD + names))
    other = protocol.parse_hello(b"\x01" + HEAD[1:] + names)
    assert "the plugin speaks protocol 1, and this vmibridge 3" in protocol.check_hello(other)


@pytest.mark.parametrize("any_of", range(4))
@pytest.mark.parametrize("magics", [[], [5, 0xFFFF_FFFF], range(64)])
def test_welcome_says_which_traps_are_ours(magics, any_of):
    traps = TrapFilter(frozenset(magics), any_hypercall=any_of & 1 > 0, any_cpuid=any_of & 2 > 0)
    body = struct.pack(f"<IIII{len(magics)}I", 3, 0b1110, any_of, len(magics), *magics)
    assert protocol.welcome(traps) == struct.pack("<II", 16, len(body)) + body


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_trap(kind):
    event = protocol.parse_trap(trap(kind=kind), 5, "box", 1024)
    assert event.reason == [TrapReason.CPUID, TrapReason.VMCALL, TrapReason.VMMCALL][kind - 1]
    assert (event.seq, event.vm, event.vcpu) == (5, "box", 1024)
    assert (event.ip, event.length, event.width, event.ring) == (0x4000_0000_1234, 3, 64, 3)
    assert event.registers.rip == event.ip
    for value, name in enumerate(NAMES[:-1], 100):
        assert getattr(event.registers, name.replace("eflags", "rflags")) == value


@pytest.mark.parametrize(("flags", "known"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_trap_says_whether_its_flags_are_known(flags, known):
    assert protocol.parse_trap(trap(flags), 5, "box", 0).flags_known is known


@pytest.mark.parametrize(
    ("field", "values"),
    [("kind", (0, 4, 255)), ("width", (0, 8, 128)), ("length", (0, 1, 16)), ("ring", (4,))],
)
def test_a_trap_with_a_wrong_field_is_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"a TRAP of .*{value}"):
            protocol.parse_trap(trap(**{field: value}), 1, "vm", 0)


@pytest.mark.parametrize(
    ("parse", "wrong"),
    [
        (protocol.parse_hello, [b"", HELLO[:39], HELLO[:55], HELLO.ljust(4097, b"a")]),
        (lambda body: protocol.parse_trap(body, 1, "vm", 0), [trap()[:-1], trap() + b"\0"]),
        (lambda body: protocol.parse_memory(body, 4), [b"", b"\0" * 3, b"\0" * 7, b"\0" * 9]),
        (lambda count: protocol.welcome(TrapFilter(frozenset(range(count)))), [65, 100]),
    ],
)
def test_what_has_a_wrong_size_is_refused(parse, wrong):
    for each in wrong:
        with pytest.raises(ValueError, match=r"a HELLO|a TRAP|a MEMORY|magics"):
            parse(each)


@given(st.binary(max_size=300) | st.binary(min_size=192, max_size=192))
def test_any_bytes_are_read_or_refused_with_a_value_error(data):
    reader = FrameReader()
    reader.feed(data)
    for parse in (
        reader.next,
        lambda: protocol.check_hello(protocol.parse_hello(data)),
        lambda: protocol.parse_trap(data, 1, "vm", 0),
        lambda: protocol.parse_memory(data, 8),
    ):
        with contextlib.suppress(ValueError):
            parse()


@pytest.mark.parametrize("value", [0, 0xFFFF_FFFF_FFFF_FFFF])
@pytest.mark.parametrize("mask", range(16))
def test_an_answer_writes_what_is_given(mask, value):
    values = [value if mask >> at & 1 else None for at in range(4)]
    body = struct.pack("<QII4Q", 0x1003, mask, 0, *(each or 0 for each in values))
    assert protocol.answer(RegisterWrites(0x1003, *values)) == struct.pack("<II", 18, 48) + body


def test_the_other_frames():
    assert protocol.answer(None) == struct.pack("<II", 19, 0)
    assert protocol.refused("x" * 600) == struct.pack("<II", 17, 500) + b"x" * 500
    assert protocol.read_memory(1 << 32, 9) == struct.pack("<II QII", 20, 16, 1 << 32, 9, 0)
    head = struct.pack("<II QII", 21, 16 + 4, 1 << 32, 4, 0)
    assert protocol.write_memory(1 << 32, b"abcd") == head + b"abcd"
    assert protocol.parse_memory(b"\0\0\0\0abcd", 4) == b"abcd"
    assert protocol.parse_memory(b"\1\0\0\0", 4) is None
