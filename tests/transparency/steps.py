"""Instructions as bytes, for 64-, 32- and 16-bit code, with their text for people."""

import struct
from typing import NamedTuple

from transparency.layout import CODE, PAGE, TABLE_A, TABLE_B, WINDOW

_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
BINARY = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_TRAPS = {"cpuid": b"\x0f\xa2", "vmcall": b"\x0f\x01\xc1", "vmmcall": b"\x0f\x01\xd9"}
SUB_PAGES = 3
"""Subroutines at most; each has a physical page of its own behind those of the main code."""
MAIN_PAGES = 3
ALIASES = 3
"""Virtual pages of the window that a subroutine is at; with one more, its physical address."""


class Plain(NamedTuple):
    """One instruction."""

    text: str
    code: bytes


class Call(NamedTuple):
    """A near call of a subroutine at one of its addresses."""

    sub: int
    alias: int


class Branch(NamedTuple):
    """A conditional jump over a few instructions."""

    condition: int
    body: tuple[Plain, ...]


class PageEnd(NamedTuple):
    """A jump to a few bytes before the next page."""

    distance: int


class Patchable(NamedTuple):
    """One of two instructions: the first, until the guest or a handler writes the other."""

    forms: tuple[Plain, Plain]

    def code(self, form: int) -> bytes:
        size = max(len(each.code) for each in self.forms) + 3 & ~3
        return self.forms[form].code.ljust(size, b"\x90")


class Patch(NamedTuple):
    """The guest writes a form of a `Patchable`, at its physical address or in the window."""

    sub: int
    number: int
    form: int
    alias: int


class Remap(NamedTuple):
    """The guest maps another subroutine's page at an address of one."""

    sub: int
    alias: int
    target: int
    by_cr3: bool
    in_b: bool


class Switch(NamedTuple):
    """The guest loads CR3 with the root of the other address space, or of the first."""

    to_b: bool


class Redescribe(NamedTuple):
    """The guest writes the upper half of the descriptor of CS, and does not load CS again."""

    flip: int


Step = Plain | Call | Branch | PageEnd | Patchable | Patch | Redescribe | Remap | Switch


def window_page(sub: int, alias: int) -> int:
    """Which page of the window."""
    return MAIN_PAGES + alias * SUB_PAGES + sub


def page_of_sub(sub: int) -> int:
    """The physical address."""
    return CODE + (MAIN_PAGES + sub) * PAGE


def address_of(sub: int, alias: int) -> int:
    """The linear address of a subroutine's page; the alias behind the last is the physical one."""
    if alias == ALIASES:
        return page_of_sub(sub)
    return WINDOW + window_page(sub, alias) * PAGE


class Assembler:
    """For one width of code."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.near = 2 if width == 16 else 4
        self.sizes = (2, 4, 8) if width == 64 else (2, 4)

    def name(self, register: int, size: int) -> str:
        if register > 7:
            return f"r{register}{'wd'[size > 2] if size < 8 else ''}"
        return {2: "", 4: "e", 8: "r"}[size] + _NAMES[register]

    def _prefix(self, size: int, middle: int = 0, register: int = 0) -> bytes:
        code = b"\x66" if size < 8 and (size == 2) != (self.width == 16) else b""
        rex = (size == 8) << 3 | (middle > 7) << 2 | register > 7
        rex = (8 if size == 8 else 0) | (4 if middle > 7 else 0) | (1 if register > 7 else 0)
        return code + (bytes([0x40 | rex]) if rex else b"")

    def on_register(self, opcode: bytes, middle: int, register: int, size: int) -> bytes:
        modrm = 0xC0 | (middle & 7) << 3 | register & 7
        return self._prefix(size, middle, register) + opcode + bytes([modrm])

    def on_memory(self, opcode: bytes, middle: int, address: int, size: int) -> bytes:
        """At a linear address below 4 GiB."""
        short = b"\x67" if self.width == 16 or (self.width == 64 and address >> 31) else b""
        place = b"\x25" if self.width == 64 else b""
        modrm = (middle & 7) << 3 | (4 if self.width == 64 else 5)
        code = self._prefix(size, middle) + opcode + bytes([modrm]) + place
        return short + code + struct.pack("<I", address)

    def mov(self, register: int, value: int, size: int) -> Plain:
        code = self._prefix(size, 0, register) + bytes([0xB8 | register & 7])
        text = f"mov {self.name(register, size)}, {value:#x}"
        return Plain(text, code + value.to_bytes(size, "little"))

    def store(self, address: int, value: int) -> Plain:
        """Four bytes."""
        code = self.on_memory(b"\xc7", 0, address, 4)
        return Plain(f"mov dword [{address:#x}], {value:#x}", code + struct.pack("<I", value))

    def trap(self, reason: str, prefixes: bytes) -> Plain:
        words = f"db {', '.join(f'{byte:#x}' for byte in prefixes)}; " if prefixes else ""
        return Plain(words + reason, prefixes + _TRAPS[reason])

    # --- steps of more than one instruction ----------------------------------------

    def write_code(self, address: int, code: bytes) -> list[Plain]:
        words = struct.unpack(f"<{len(code) // 4}I", code)
        return [self.store(address + 4 * at, word) for at, word in enumerate(words)]

    def remap(self, step: Remap, root: int) -> list[Plain]:
        """`root` is the one that is loaded again where `by_cr3`."""
        table = TABLE_B if step.in_b else TABLE_A
        page = window_page(step.sub, step.alias)
        done = [self.store(table + 8 * page, page_of_sub(step.target) | 7)]
        if step.by_cr3:
            return done + self.switch(root)
        address = WINDOW + page * PAGE
        code = self.on_memory(b"\x0f\x01", 7, address, 4 if self.width != 16 else 2)
        return [*done, Plain(f"invlpg [{address:#x}]", code)]

    def switch(self, root: int) -> list[Plain]:
        load = self.mov(6, root, 4)
        return [load, Plain("mov cr3, esi", b"\x0f\x22\xde")]
