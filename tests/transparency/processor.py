"""Memory, registers and the decoder of the reference: what all instructions have in common."""

from collections.abc import Callable
from typing import ClassVar

from transparency.alu import IF
from transparency.layout import (
    APIC,
    GDT,
    INTERRUPT,
    LDT,
    MEMORY_END,
    PAGE,
    ROOT_A,
    TABLE_A,
    TABLE_B,
    WINDOW,
    WINDOW_PAGES,
)
from transparency.records import Answer, End, FaultError, Start, UnmodelledError

_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_M32 = 0xFFFF_FFFF
_M64 = (1 << 64) - 1
_UD, _GP = 6, 13
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
STRING_ORDER = (RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, *range(8, 16))
"""In the order of `vmibridge.Registers`."""


class Processor:
    """The state of one program. `ends_at_fault`: no exception is delivered."""

    handlers: ClassVar[dict[int, Callable[["Processor", int], int | None]]] = {}
    """The instructions, by their opcodes."""

    def __init__(
        self,
        start: Start,
        ram: bytearray,
        answers: tuple[Answer, ...],
        *,
        ends_at_fault: bool = False,
    ) -> None:
        self.end = End(ram=ram)
        self._start = start
        self._width, self._base = start.width, 0 if start.width == 64 else start.base
        self._mask = {64: _M64, 32: _M32, 16: 0xFFFF}[start.width]
        self._answers = answers
        self._ends_at_fault = ends_at_fault
        self.regs = list(start.registers)
        self.rip, self.flags = start.rip, start.rflags
        self.ram = ram
        self._descriptor = (LDT if start.cs & 4 else GDT) + (start.cs & ~7)
        self._is_described_otherwise = False
        self._table = TABLE_A if start.root == ROOT_A else TABLE_B
        self._pending = False
        self._holds_debug = self._holds_interrupt = False
        """What MOV SS and STI hold off until the next instruction has run."""

    # --- memory --------------------------------------------------------------------

    def _linear(self, offset: int) -> int:
        return offset if self._width == 64 else self._base + offset & _M32

    def _physical(self, linear: int) -> int:
        page = linear - WINDOW >> 12
        if 0 <= page < WINDOW_PAGES:
            at = self._table - TABLE_A + 8 * page
            entry = int.from_bytes(self.ram[at : at + 8], "little")
            if not entry & 1:
                raise UnmodelledError("a page fault")
            linear = (entry & 0xFFFF_F000) + (linear & 0xFFF)
        if not TABLE_A <= linear < MEMORY_END:
            raise UnmodelledError(f"an access to {linear:#x}")
        return linear - TABLE_A

    def _load(self, linear: int, size: int) -> int:
        first = self._physical(linear)
        if linear % PAGE + size <= PAGE:
            return int.from_bytes(self.ram[first : first + size], "little")
        return sum(self.ram[self._physical(linear + at)] << 8 * at for at in range(size))

    def _save(self, linear: int, value: int, size: int) -> None:
        if linear == APIC + 0x300:
            if value & 0xF_FFFF != 0x4_0000 | INTERRUPT or self.flags & IF or self._pending:
                raise UnmodelledError("an interrupt at no certain place")
            self._pending = True
            return
        if self._descriptor - size < linear < self._descriptor + 8:
            self._is_described_otherwise = True
        for at in range(size):
            self.ram[self._physical(linear + at)] = value >> 8 * at & 0xFF

    def _push(self, value: int, size: int) -> None:
        self.regs[RSP] = self.regs[RSP] - size & _M64
        self._save(self.regs[RSP], value, size)

    def _pop(self, size: int) -> int:
        value = self._load(self.regs[RSP], size)
        self.regs[RSP] += size
        return value

    # --- one instruction -----------------------------------------------------------

    def _fetch(self) -> int:
        if self._length == 15:
            raise FaultError(_GP, 16)
        value = self.ram[self._physical(self._linear(self.rip + self._length & self._mask))]
        self._length += 1
        return value

    def _immediate(self, size: int) -> int:
        value = 0
        for at in range(size):
            value |= self._fetch() << 8 * at
        return value

    def _signed(self, size: int) -> int:
        value = self._immediate(size)
        return value - (value >> 8 * size - 1 << 8 * size)

    def _step(self) -> int:
        """Returns the vector of the end, or 0."""
        self._length, self._rex, prefixes = 0, 0, set()
        while True:
            byte = self._fetch()
            if byte in _LEGACY:
                prefixes.add(byte)
                self._rex = 0
            elif self._width == 64 and byte & 0xF0 == 0x40:
                self._rex = byte
            else:
                break
        self._locked = 0xF0 in prefixes
        self._short_address = 0x67 in prefixes
        narrow = 0x66 in prefixes
        if self._width == 64:
            self._size = 8 if self._rex & 8 else 2 if narrow else 4
            self._stack = 2 if narrow else 8
        else:
            self._size = self._stack = 2 if narrow == (self._width == 32) else 4
        opcode = byte if byte != 0x0F else 0x0F00 | self._fetch()
        handler = self.handlers.get(opcode)
        if handler is None:
            raise UnmodelledError(f"opcode {opcode:#x}")
        vector = handler(self, opcode)
        if vector is None:
            self.rip = self.rip + self._length & self._mask
        return vector or 0

    def _check_lock(self, *, allowed: bool = False) -> None:
        if self._locked and not allowed:
            if self._ends_at_fault:
                raise UnmodelledError("Unicorn's translator takes no notice of many a LOCK")
            raise FaultError(_UD, self._length)

    def _get(self, number: int) -> int:
        return self.regs[number] & (1 << 8 * self._size) - 1

    def _set(self, number: int, value: int) -> None:
        if self._size == 2:
            self.regs[number] = self.regs[number] & ~0xFFFF | value & 0xFFFF
        else:
            self.regs[number] = value & (1 << 8 * self._size) - 1

    def _modrm(self) -> tuple[int, int | None, int]:
        """The middle field; a register's number or `None`; an address."""
        byte = self._fetch()
        middle = byte >> 3 & 7 | (self._rex & 4) << 1
        if byte >= 0xC0:
            return middle, byte & 7 | (self._rex & 1) << 3, 0
        if byte & 0xC7 == 4 and self._width == 64:
            if self._fetch() != 0x25:
                raise UnmodelledError("an index register")
        elif byte & 0xC7 != 5 or self._width == 64 or (self._width == 16) != self._short_address:
            raise UnmodelledError("an address form")
        return middle, None, self._immediate(4)

    def _read(self, register: int | None, address: int) -> int:
        return self._load(address, self._size) if register is None else self._get(register)

    def _write(self, register: int | None, address: int, value: int) -> None:
        if register is None:
            self._save(address, value, self._size)
        else:
            self._set(register, value)

    def _jump(self, offset: int) -> int:
        self.rip = self.rip + self._length + offset & self._mask
        return 0
