"""Where a stub keeps the registers in a `g` packet, from its target description.

GDB manual, appendix G (target descriptions): registers are laid out by their numbers, one
after the other, each of `bitsize` bits, little-endian on x86. A layout is made once and then
read by one `struct`; without a description QEMU's own for x86-64 is taken.
"""

import struct
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple
from xml.parsers import expat

from vmibridge.backends.qemu.gdb.commands import ReplyError
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import Registers, RegisterWrites

MAX_DESCRIPTION = 1 << 20
"""Bytes of all documents of a description."""
MAX_ANNEXES = 32
_MAX_REGISTERS = 1024
_MAX_BITS = 4096

_GENERAL = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_NAMES_64 = (*(f"r{name}" for name in _GENERAL), *(f"r{number}" for number in range(8, 16)))
_REGISTERS = X86.names
_SIZES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_CONTROL = ("cr0", "cr3", "cr4", "efer")


class Field(NamedTuple):
    """A register in a `g` packet, in bytes."""

    offset: int
    size: int


class Description(NamedTuple):
    """What one document of a target description says."""

    architecture: str
    registers: list[tuple[str, int, int | None]]
    """Name, bits, and number where one is given."""
    includes: list[str]


def parse_description(document: bytes) -> Description:
    """Raises `ReplyError` for what is no description, is too large, or declares entities."""
    if len(document) > MAX_DESCRIPTION:
        raise ReplyError(f"a target description of {len(document)} bytes")
    found = Description("", [], [])
    architecture: list[str] = []
    within: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        within.append(name)
        if name == "reg":
            found.registers.append(_register(attributes))
        elif name == "xi:include":
            found.includes.append(attributes.get("href", ""))

    def text(data: str) -> None:
        if within[-1] == "architecture":
            architecture.append(data)

    def refuse(*_arguments: Any) -> None:
        raise ReplyError("a target description with entities")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _name: within.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(document, True)
    except expat.ExpatError as error:
        raise ReplyError(f"a target description that is no XML: {error}") from None
    if len(found.registers) > _MAX_REGISTERS:
        raise ReplyError(f"a target description with {len(found.registers)} registers")
    return found._replace(architecture="".join(architecture).strip())


def _register(attributes: dict[str, str]) -> tuple[str, int, int | None]:
    name, number = attributes.get("name", ""), attributes.get("regnum")
    try:
        bits = int(attributes.get("bitsize", ""))
        place = None if number is None else int(number)
    except ValueError:
        raise ReplyError(f"register {name!r} without a size") from None
    if bits % 8 or not 8 <= bits <= _MAX_BITS or not (place is None or 0 <= place < 1 << 16):
        raise ReplyError(f"register {name!r} of {bits} bits, number {place}")
    return name, bits, place


def _writer(place: Field) -> tuple[Callable[[bytearray, int, int], None], int, int]:
    offset, size = place
    return struct.Struct("<" + _SIZES[size]).pack_into, offset, (1 << 8 * size) - 1


class RegisterLayout:
    """The registers of one kind of vCPU. Raises `ReplyError` when RIP and its like are missing."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self.fields: dict[str, Field] = dict(fields)
        self.is_wide: bool = "rip" in fields
        # As the stub calls them, by their names in the description.
        called = {
            name: "eflags" if name == X86.flags else name if self.is_wide else _narrow(name)
            for name in _REGISTERS
        }
        names = tuple(called.values())
        pointer, stack = called[X86.instruction_pointer], called["rsp"]
        own = {name: fields[name] for name in (*names, "cs") if name in fields}
        missing = {called[f"r{name}"] for name in _GENERAL} | {pointer, "eflags", "cs"}
        if missing := missing - own.keys():
            raise ReplyError(f"a vCPU without {', '.join(sorted(missing))}")
        self.has_control: bool = all(name in own for name in _CONTROL)
        """Whether CR0 and the others are there: without them no address can be translated."""
        ordered = sorted(own, key=lambda name: own[name].offset)
        layout, at = "<", 0
        for name in ordered:
            offset, size = own[name]
            if size not in _SIZES:
                raise ReplyError(f"register {name} of {size} bytes")
            layout += f"{offset - at}x{_SIZES[size]}"
            at = offset + size
        self._struct = struct.Struct(layout)
        # One more value, 0, stands for the registers that are not there.
        places = [ordered.index(name) if name in own else len(ordered) for name in (*names, "cs")]
        self._get = itemgetter(*places)
        writes = [own[called[name]] for name in ("rax", "rbx", "rcx", "rdx")] + [own[pointer]]
        frame = [
            own[pointer],
            own["cs"],
            own["eflags"],
            own[stack],
            fields.get("ss", own["cs"]),
        ]
        self._short = max(place.offset + place.size for place in writes)
        self._with_frame = max(place.offset + place.size for place in frame)
        self._writes = [_writer(place) for place in writes]
        self._frame = [_writer(place) for place in frame]

    @property
    def size(self) -> int:
        """Bytes that are read at least."""
        return self._struct.size

    def read(self, data: bytes) -> tuple[Registers, int]:
        """The registers, and CS. Raises `ReplyError` for a packet that is too short."""
        if len(data) < self._struct.size:
            raise ReplyError(f"registers of {len(data)} bytes, and {self._struct.size} are due")
        *values, cs = self._get((*self._struct.unpack_from(data), 0))
        return Registers(*values), cs

    def shows_64_bits(self, registers: Registers) -> bool:
        """Whether these can only be registers of 64-bit code: QEMU shows other code's low halves.

        R8 to R15 are zero then. `False` says nothing: a register may be small.
        """
        if not self.is_wide:
            return False
        found = registers
        if found.r8 | found.r9 | found.r10 | found.r11 | found.r12 | found.r13 | found.r14:
            return True
        low = found.rax | found.rbx | found.rcx | found.rdx | found.rsi | found.rdi
        return bool(found.r15 or (low | found.rbp | found.rsp | found.rip) >> 32)

    def write(self, data: bytes, writes: RegisterWrites) -> bytes:
        """`data` from its begin to the last register that is written, with the writes in it."""
        found = bytearray(data[: self._short])
        values = (writes.rax, writes.rbx, writes.rcx, writes.rdx, writes.rip)
        for (pack_into, offset, mask), value in zip(self._writes, values, strict=True):
            if value is not None:
                pack_into(found, offset, value & mask)
        return bytes(found)

    def write_frame(self, data: bytes, writes: RegisterWrites, frame: "Frame") -> bytes:
        """The same, and back from an exception: what IRET would take from its frame."""
        found = bytearray(data[: self._with_frame])
        found[: self._short] = self.write(data, writes)
        values = (writes.rip, frame.cs, frame.flags, frame.sp, frame.ss)
        for (pack_into, offset, mask), value in zip(self._frame, values, strict=True):
            pack_into(found, offset, value & mask)
        return bytes(found)


class Frame(NamedTuple):
    """What the processor pushes at an exception without an error code in 64-bit mode.

    Intel SDM volume 3, section 6.14.2.
    """

    ip: int
    cs: int
    flags: int
    sp: int
    ss: int


_FRAME = struct.Struct("<5Q")
FRAME_SIZE = _FRAME.size


def parse_frame(data: bytes) -> Frame:
    """From the memory at RSP."""
    return Frame(*_FRAME.unpack(data))


def layout_of(documents: list[Description]) -> RegisterLayout:
    """The layout that the documents of a description make. Raises `ReplyError`."""
    numbered: dict[int, tuple[str, int]] = {}
    number = 0
    for document in documents:
        for name, bits, given in document.registers:
            number = number if given is None else given
            if number in numbered:
                raise ReplyError(f"registers {numbered[number][0]} and {name} have one number")
            numbered[number] = name, bits // 8
            number += 1
    fields: dict[str, Field] = {}
    offset = 0
    for number in sorted(numbered):
        name, size = numbered[number]
        fields.setdefault(name, Field(offset, size))
        offset += size
    return RegisterLayout(fields)


def _qemu_x86_64() -> dict[str, Field]:
    names = [(name, 8) for name in (*_NAMES_64, "rip")]
    names += [(name, 4) for name in ("eflags", "cs", "ss", "ds", "es", "fs", "gs")]
    names += [(name, 8) for name in ("fs_base", "gs_base", "k_gs_base")]
    names += [(name, 8) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")]
    fields, offset = {}, 0
    for name, size in names:
        fields[name] = Field(offset, size)
        offset += size
    return fields


QEMU_X86_64 = RegisterLayout(_qemu_x86_64())
"""What `g` of every `qemu-system-x86_64` begins with; measured with 7.2 and 11.1."""


def _narrow(name: str) -> str:
    if name[1:] in (*_GENERAL, "ip"):
        return "e" + name[1:]
    return name
