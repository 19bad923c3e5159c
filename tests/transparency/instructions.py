"""The instructions of the reference, the traps among them."""

from transparency import alu
from transparency.alu import AC, AF, CF, DF, ID, IF, IOPL, NT, OF, PF, RF, SF, TF, VM, ZF
from transparency.layout import END_VECTOR, FOREIGN_LEAF, MAGIC, ROOT_A, TABLE_A, TABLE_B
from transparency.processor import RAX, RBP, RBX, RCX, RDX, STRING_ORDER, Processor
from transparency.records import FaultError, Shown, UnmodelledError

_M32 = 0xFFFF_FFFF
_UD, _GP = 6, 13


class Instructions(Processor):
    """Each method is one group of opcodes: it returns `None` to go on behind, 0 after a jump."""

    # --- traps ---------------------------------------------------------------------

    def _trap(self, reason: str, magic: int) -> int | None:
        if self._locked:
            raise FaultError(_UD, self._length)
        if magic & _M32 != MAGIC:
            if reason != "cpuid":
                raise FaultError(_UD, self._length)
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
            raise FaultError(_GP, self._length)

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
        if middle & 7 not in (alu.SHL, alu.SHR, alu.SAR):
            raise UnmodelledError("D1")
        value, self.flags = alu.shift_by_1(
            middle & 7,
            self._read(register, address),
            self._size,
            self.flags,
            self._start.af_of_shifts,
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
                raise FaultError(_GP, self._length)
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
        raise FaultError(_UD, self._length)

    def _int3(self, _opcode: int) -> int:
        self._check_lock()
        self.rip = self.rip + self._length & self._mask
        raise FaultError(3, 0)

    def _int(self, _opcode: int) -> int:
        vector = self._fetch()
        self._check_lock()
        if vector != END_VECTOR:
            raise UnmodelledError("INT")
        self.rip = self.rip + self._length & self._mask
        return vector


_Is = Instructions
Instructions.handlers = {
    0x0FA2: _Is._cpuid,
    0x0F01: _Is._group_0f01,
    0x0F0B: _Is._ud2,
    0x81: _Is._alu_immediate,
    0x83: _Is._alu_immediate,
    0x85: _Is._test,
    0x87: _Is._exchange,
    0x89: _Is._mov_store,
    0x8B: _Is._mov_load,
    0x8E: _Is._mov_ss,
    0x90: _Is._nop,
    0x0F1F: _Is._nop,
    0x9C: _Is._push_flags,
    0x9D: _Is._pop_flags,
    0x9E: _Is._lahf,
    0x9F: _Is._lahf,
    0xC3: _Is._ret,
    0xC7: _Is._mov_immediate,
    0xCC: _Is._int3,
    0xCD: _Is._int,
    0xD1: _Is._shift,
    0xE8: _Is._jmp,
    0xE9: _Is._jmp,
    0xEB: _Is._jmp,
    0xF7: _Is._group_f7,
    0xFF: _Is._group_ff,
    0x0F22: _Is._mov_cr3,
    **{0x50 + at: _Is._push_register for at in range(8)},
    **{0x58 + at: _Is._pop_register for at in range(8)},
    **{0xB8 + at: _Is._mov_register for at in range(8)},
    **{0x70 + at: _Is._jcc for at in range(16)},
    **{0x0F90 + at: _Is._setcc for at in range(16)},
    **{kind << 3 | form: _Is._alu_modrm for kind in range(8) for form in (1, 3)},
    **dict.fromkeys((0xF5, 0xF8, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD), _Is._set_flag),
}
