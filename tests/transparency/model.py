"""The reference: what a processor does with a generated program.

A small interpreter of machine code, by the manual (Intel SDM volumes 1 to 3): its own decoder, its
own flags, no translation and no caches. It shares no code with vmibridge. It knows the
instructions that the generator makes, and raises `UnmodelledError` for everything else.

A trap that is ours is an instruction that writes the answer's registers and RIP. Of the rest:

| state | by |
|---|---|
| #DB of TF follows each instruction that began with TF set, but for MOV SS | volume 3, 18.3.1.4 |
| an instruction breakpoint comes before its instruction, unless RF is set | volume 3, 18.3.1.1 |
| no interrupt is taken right behind an STI that set IF, or a MOV SS | volume 3, 7.8.3 |
| LOCK before what cannot be locked is #UD | volume 2, LOCK |
| a REX prefix counts only right before the opcode | volume 2, 2.2.1 |
| an instruction of more than 15 bytes is #GP | volume 2, 2.3.11 |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from transparency import alu
from transparency.alu import AC, AF, CF, DF, ID, IF, IOPL, NT, OF, PF, RF, SF, TF, VM, ZF
from transparency.layout import (
    APIC,
    CODE,
    END_VECTOR,
    FOREIGN_LEAF,
    INTERRUPT,
    MAGIC,
    MAX_FIXUPS,
    MAX_LOG,
    MEMORY_END,
    PAGE,
    TABLE_A,
    TABLE_B,
    ROOT_A,
    WINDOW,
    WINDOW_PAGES,
)

_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_M32 = 0xFFFF_FFFF
_M64 = (1 << 64) - 1
_MAX_STEPS = 2000
_UD, _GP = 6, 13
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
STRING_ORDER = (RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, *range(8, 16))
"""In the order of `vmibridge.Registers`."""


class UnmodelledError(Exception):
    """The program does what this reference does not know."""


class _FaultError(Exception):
    def __init__(self, vector: int, length: int) -> None:
        self.vector, self.length = vector, length


class Answer(NamedTuple):
    """What the handler leaves behind: RAX, RBX, RCX, RDX, and bytes at physical addresses."""

    values: tuple[int | None, ...]
    writes: tuple[tuple[int, bytes], ...] = ()


class Shown(NamedTuple):
    """What the handler of a trap has to see."""

    reason: str
    ip: int
    length: int
    width: int
    ring: int
    registers: tuple[int, ...]
    rflags: int


class Logged(NamedTuple):
    """An exception that the guest was given."""

    vector: int
    cs: int
    rip: int
    rflags: int
    dr6: int


@dataclass
class Start:
    """The state that a program begins in."""

    width: int
    ring: int
    cs: int
    ss: int
    base: int
    rip: int
    rflags: int
    registers: list[int]
    root: int = ROOT_A
    breakpoints: tuple[int, ...] = ()
    """Linear addresses."""


@dataclass
class End:
    """The state that a program leaves behind, and what happened in it."""

    vector: int = 0
    rip: int = 0
    rflags: int = 0
    registers: list[int] = field(default_factory=list)
    ram: bytearray = field(default_factory=bytearray)
    """From `TABLE_A` to `MEMORY_END`."""
    shown: list[Shown] = field(default_factory=list)
    log: list[Logged] = field(default_factory=list)
    fixups: list[int] = field(default_factory=list)
    steps: int = 0


class Model:
    """One program on the reference. `ends_at_fault`: no exception is delivered."""

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
        self._table = TABLE_A if start.root == ROOT_A else TABLE_B
        self._pending = False
        self._holds_debug = self._holds_interrupt = False
        """What MOV SS and STI hold off until the next instruction has run."""

    def run(self) -> End:
        """To the end of the program."""
        end, points = self.end, self._start.breakpoints
        if points and self.flags & TF:
            raise UnmodelledError("TF and breakpoints at once")
        while True:
            end.steps += 1
            if end.steps > _MAX_STEPS:
                raise UnmodelledError("it does not end")
            if self._pending and self.flags & IF and not self._holds_interrupt:
                self._pending = False
                self._log(INTERRUPT, 0)
            linear = self._linear(self.rip)
            if points and linear in points and not self.flags & RF:
                if self._holds_debug:
                    raise UnmodelledError("a breakpoint behind MOV SS")
                self._log(1, 1 << points.index(linear))
                if self._ends_at_fault:
                    return self._done(1)
                self.flags |= RF
            stepping = self.flags & TF
            held = self._holds_interrupt
            self._holds_debug = self._holds_interrupt = False
            try:
                vector = self._step()
            except _FaultError as fault:
                self._log(fault.vector, 0)
                if self._ends_at_fault or fault.vector == 3:
                    return self._done(fault.vector)
                end.fixups.append(self.rip + fault.length & self._mask)
                if len(end.fixups) > MAX_FIXUPS:
                    raise UnmodelledError("too many faults") from fault
                self.rip = end.fixups[-1]
                self.flags |= RF  # as a fault pushes it (volume 3, 18.3.1.1)
                continue
            if vector:
                return self._done(vector)
            if held and self._holds_interrupt and self._pending:
                raise UnmodelledError("only the first of a row is sure to hold interrupts off")
            self.flags &= ~RF
            if stepping and not self._holds_debug:
                self._log(1, 0x4000)
                if self._ends_at_fault:
                    return self._done(1)

    def _done(self, vector: int) -> End:
        if self._pending:
            raise UnmodelledError("an interrupt that is left for the next program")
        end = self.end
        end.vector, end.rip, end.rflags, end.registers = vector, self.rip, self.flags, self.regs
        return end

    def _log(self, vector: int, dr6: int) -> None:
        if len(self.end.log) >= MAX_LOG - 1:
            raise UnmodelledError("too many exceptions")
        entry = Logged(vector, self._start.cs, self.rip, self.flags & ~RF, dr6)
        self.end.log.append(entry)

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
            raise _FaultError(_GP, 16)
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
        handler = _HANDLERS.get(opcode)
        if handler is None:
            raise UnmodelledError(f"opcode {opcode:#x}")
        vector = handler(self, opcode)
        if vector is None:
            self.rip = self.rip + self._length & self._mask
        return vector or 0

    def _check_lock(self, *, allowed: bool = False) -> None:
        if self._locked and not allowed:
            raise _FaultError(_UD, self._length)

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

    # --- traps ---------------------------------------------------------------------

    def _trap(self, reason: str, magic: int) -> int | None:
        self._check_lock()
        if magic & _M32 != MAGIC:
            if reason != "cpuid":
                raise _FaultError(_UD, self._length)
            if magic & _M32 != FOREIGN_LEAF:
                raise UnmodelledError("a leaf of CPUID")
            for register in (RAX, RBX, RCX, RDX):
                self.regs[register] = 0
            return None
        number = len(self.end.shown)
        if number >= len(self._answers):
            raise UnmodelledError("a trap without an answer")
        values, writes = self._answers[number]
        registers = tuple(self.regs[at] for at in STRING_ORDER)
        self.end.shown.append(
            Shown(
                reason, self.rip, self._length, self._width, self._start.ring, registers,
                self.flags & ~RF,
            )
        )  # fmt: skip
        for register, value in zip((RAX, RBX, RCX, RDX), values, strict=True):
            if value is not None:
                self.regs[register] = value
        for address, data in writes:
            self.ram[address - TABLE_A : address - TABLE_A + len(data)] = data
        return None

    def _cpuid(self, _opcode: int) -> int | None:
        return self._trap("cpuid", self.regs[RAX])

    def _group_0f01(self, _opcode: int) -> int | None:
        magic = self.regs[RCX if self._width == 64 else RBP]
        at = self._length
        byte = self._fetch()
        if byte == 0xC1:
            return self._trap("vmcall", magic)
        if byte == 0xD9:
            return self._trap("vmmcall", magic)
        self._length = at
        middle, register, _address = self._modrm()
        if middle & 7 != 7 or register is not None:
            raise UnmodelledError("0F 01")
        self._check_lock()
        self._need_ring_0()  # INVLPG
        return None

    def _need_ring_0(self) -> None:
        if self._start.ring:
            raise _FaultError(_GP, self._length)

    # --- the others ----------------------------------------------------------------

    def _alu_modrm(self, opcode: int) -> None:
        middle, register, address = self._modrm()
        kind = opcode >> 3 & 7
        to_memory = not opcode & 2
        self._check_lock(allowed=to_memory and register is None and kind != alu.CMP)
        left, right = self._read(register, address), self._get(middle)
        if not to_memory:
            left, right = right, left
        value, self.flags = alu.binary(kind, left, right, self._size, self.flags)
        if kind != alu.CMP:
            if to_memory:
                self._write(register, address, value)
            else:
                self._set(middle, value)

    def _alu_immediate(self, opcode: int) -> None:
        middle, register, address = self._modrm()
        kind = middle & 7
        right = self._signed(1 if opcode == 0x83 else min(self._size, 4))
        self._check_lock(allowed=register is None and kind != alu.CMP)
        left = self._read(register, address)
        value, self.flags = alu.binary(kind, left, right, self._size, self.flags)
        if kind != alu.CMP:
            self._write(register, address, value)

    def _test(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock()
        both = self._read(register, address) & self._get(middle)
        _, self.flags = alu.binary(alu.AND, both, both, self._size, self.flags)

    def _mov_store(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock()
        self._write(register, address, self._get(middle))

    def _mov_load(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock()
        self._set(middle, self._read(register, address))

    def _mov_immediate(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        value = self._signed(min(self._size, 4))
        self._check_lock()
        if middle & 7:
            raise UnmodelledError("C7")
        self._write(register, address, value)

    def _mov_register(self, opcode: int) -> None:
        value = self._immediate(self._size)
        self._check_lock()
        self._set(opcode & 7 | (self._rex & 1) << 3, value)

    def _group_f7(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock(allowed=register is None)
        value = self._read(register, address)
        if middle & 7 == 2:
            self._write(register, address, ~value)
        elif middle & 7 == 3:
            value, self.flags = alu.binary(alu.SUB, 0, value, self._size, self.flags)
            self._write(register, address, value)
        else:
            raise UnmodelledError("F7")

    def _group_ff(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock(allowed=register is None)
        if middle & 7 > 1:
            raise UnmodelledError("FF")
        kind = alu.SUB if middle & 7 else alu.ADD
        carry = self.flags & CF
        value, flags = alu.binary(kind, self._read(register, address), 1, self._size, self.flags)
        self.flags = flags & ~CF | carry
        self._write(register, address, value)

    def _shift(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock()
        value, self.flags = alu.shift_by_1(
            middle & 7, self._read(register, address), self._size, self.flags
        )
        self._write(register, address, value)

    def _exchange(self, _opcode: int) -> None:
        middle, register, address = self._modrm()
        self._check_lock(allowed=register is None)
        value = self._read(register, address)
        self._write(register, address, self._get(middle))
        self._set(middle, value)

    def _set_flag(self, opcode: int) -> None:
        self._check_lock()
        flag = {0xF8: CF, 0xF5: CF, 0xFA: IF, 0xFC: DF}[opcode & 0xFE if opcode != 0xF5 else opcode]
        if flag == IF:
            if (self.flags & IOPL) >> 12 < self._start.ring:
                raise _FaultError(_GP, self._length)
            if self.flags & TF and opcode == 0xFB:
                raise UnmodelledError("STI and a single step")
            self._holds_interrupt = opcode == 0xFB and not self.flags & IF
        if opcode == 0xF5:
            self.flags ^= CF
        elif opcode & 1:
            self.flags |= flag
        else:
            self.flags &= ~flag

    def _push_flags(self, _opcode: int) -> None:
        self._check_lock()
        self._push(self.flags & ~(RF | VM) & (1 << 8 * self._stack) - 1, self._stack)

    def _pop_flags(self, _opcode: int) -> None:
        self._check_lock()
        writable = CF | PF | AF | ZF | SF | TF | DF | OF | NT | (AC | ID if self._stack > 2 else 0)
        if not self._start.ring:
            writable |= IOPL
        if (self.flags & IOPL) >> 12 >= self._start.ring:
            writable |= IF
        value = self._pop(self._stack)
        self.flags = self.flags & ~writable | value & writable

    def _push_register(self, opcode: int) -> None:
        self._check_lock()
        value = self.regs[opcode & 7 | (self._rex & 1) << 3]
        self._push(value & (1 << 8 * self._stack) - 1, self._stack)

    def _pop_register(self, opcode: int) -> None:
        self._check_lock()
        value, self._size = self._pop(self._stack), self._stack
        self._set(opcode & 7 | (self._rex & 1) << 3, value)

    def _lahf(self, opcode: int) -> None:
        self._check_lock()
        if self._rex:
            raise UnmodelledError("SAHF or LAHF with REX: old translators take another register")
        if opcode == 0x9F:
            value = self.flags & 0xD5 | 2
            self.regs[RAX] = self.regs[RAX] & ~0xFF00 | value << 8
        else:
            self.flags = self.flags & ~0xD5 | self.regs[RAX] >> 8 & 0xD5

    def _setcc(self, opcode: int) -> None:
        _middle, register, address = self._modrm()
        self._check_lock()
        value = int(alu.condition(opcode & 15, self.flags))
        if register is None:
            self._save(address, value, 1)
        elif register < 4 or register > 7 or self._rex:
            self.regs[register] = self.regs[register] & ~0xFF | value
        else:
            raise UnmodelledError("AH to BH")

    def _jcc(self, opcode: int) -> int | None:
        offset = self._signed(1)
        self._check_lock()
        return self._jump(offset) if alu.condition(opcode & 15, self.flags) else None

    def _jmp(self, opcode: int) -> int:
        near = 2 if self._width == 16 else 4
        offset = self._signed(1 if opcode == 0xEB else near)
        self._check_lock()
        if opcode == 0xE8:
            size = {64: 8, 32: 4, 16: 2}[self._width]
            self._push(self.rip + self._length & self._mask, size)
        return self._jump(offset)

    def _ret(self, _opcode: int) -> int:
        self._check_lock()
        self.rip = self._pop({64: 8, 32: 4, 16: 2}[self._width])
        return 0

    def _nop(self, opcode: int) -> None:
        if opcode == 0x0F1F:
            self._modrm()
        elif self._rex & 1:
            raise UnmodelledError("XCHG with R8")
        self._check_lock()

    def _mov_ss(self, _opcode: int) -> None:
        middle, register, _address = self._modrm()
        self._check_lock()
        if middle & 7 != 2 or register is None:
            raise UnmodelledError("MOV to a segment register")
        if self.regs[register] & 0xFFFF != self._start.ss:
            raise UnmodelledError("another SS")
        self._holds_debug = self._holds_interrupt = True

    def _mov_cr3(self, _opcode: int) -> None:
        middle, register, _address = self._modrm()
        self._check_lock()
        self._need_ring_0()
        if middle & 7 != 3 or register is None:
            raise UnmodelledError("MOV to a control register")
        self._table = TABLE_A if self.regs[register] & _M32 == ROOT_A else TABLE_B

    def _ud2(self, _opcode: int) -> int:
        raise _FaultError(_UD, self._length)

    def _int3(self, _opcode: int) -> int:
        self._check_lock()
        self.rip = self.rip + self._length & self._mask
        raise _FaultError(3, 0)

    def _int(self, _opcode: int) -> int:
        vector = self._fetch()
        self._check_lock()
        if vector != END_VECTOR:
            raise UnmodelledError("INT")
        self.rip = self.rip + self._length & self._mask
        return vector


_HANDLERS: dict[int, Callable[[Model, int], int | None]] = {
    0x0FA2: Model._cpuid, 0x0F01: Model._group_0f01, 0x0F0B: Model._ud2,
    0x81: Model._alu_immediate, 0x83: Model._alu_immediate, 0x85: Model._test,
    0x87: Model._exchange, 0x89: Model._mov_store, 0x8B: Model._mov_load, 0x8E: Model._mov_ss,
    0x90: Model._nop, 0x0F1F: Model._nop, 0x9C: Model._push_flags, 0x9D: Model._pop_flags,
    0x9E: Model._lahf, 0x9F: Model._lahf, 0xC3: Model._ret, 0xC7: Model._mov_immediate,
    0xCC: Model._int3, 0xCD: Model._int, 0xD1: Model._shift, 0xE8: Model._jmp, 0xE9: Model._jmp,
    0xEB: Model._jmp, 0xF7: Model._group_f7, 0xFF: Model._group_ff, 0x0F22: Model._mov_cr3,
    **{0x50 + at: Model._push_register for at in range(8)},
    **{0x58 + at: Model._pop_register for at in range(8)},
    **{0xB8 + at: Model._mov_register for at in range(8)},
    **{0x70 + at: Model._jcc for at in range(16)},
    **{0x0F90 + at: Model._setcc for at in range(16)},
    **{kind << 3 | form: Model._alu_modrm for kind in range(8) for form in (1, 3)},
    **{at: Model._set_flag for at in (0xF5, 0xF8, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD)},
}  # fmt: skip
