"""All registers of a Unicorn vCPU in one call of the C library, and writes in another.

A read by name through Unicorn's Python interface costs 2.0 us for one register; the
batch below costs 1.2 us for all. The layout of the batch's MSR and table registers is
that of `uc_x86_msr` and `uc_x86_mmr` in Unicorn 2.1's `x86.h`.
"""

import ctypes
import struct
from typing import NamedTuple

from unicorn import Uc, UcError, x86_const
from unicorn.unicorn_py3.unicorn import uclib

from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import Registers, RegisterWrites

_EFER = 0xC000_0080
_NUMBERED = tuple(f"r{n}" for n in range(8, 16))
_NAMED = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip")
# The registers of the description in its order, then CS, GDTR and LDTR. EFER, which has to be the
# last of them, is an MSR: its number stands before it. A 32-bit vCPU leaves the numbered ones 0.
_NAMES = X86.names
assert _NAMES[-1] == "efer"
_LAYOUT = struct.Struct(f"<{len(_NAMES) - 1}Q 8xQ Q 8xQI4x 8xQI4x")
_OFFSET_EFER = 8 * (len(_NAMES) - 1)
_OFFSET_CS = _OFFSET_EFER + 16
_OFFSET_GDTR = _OFFSET_CS + 8
_OFFSET_LDTR = _OFFSET_GDTR + 24


class Snapshot(NamedTuple):
    """The registers of a vCPU, and what of its segments a `TrapEvent` does not carry."""

    registers: Registers
    cs: int
    gdt: tuple[int, int]
    """Linear base address and limit in bytes."""
    ldt: tuple[int, int]


class UnicornRegisters:
    """The registers of one vCPU. For the vCPU's thread, or while it stands still."""

    def __init__(self, engine: Uc, width: int) -> None:
        self._handle = engine._uch  # noqa: SLF001 - the C functions take the C handle
        wide = width == 64
        names = {
            8 * at: _unicorn_name(name, wide)
            for at, name in enumerate(_NAMES)
            if wide or name not in _NUMBERED
        }
        names |= {_OFFSET_CS: "CS"}
        names |= {_OFFSET_GDTR: "GDTR", _OFFSET_LDTR: "LDTR"}
        self._buffer = bytearray(_LAYOUT.size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._count = len(names)
        self._ids = (ctypes.c_int * self._count)(*map(_register_id, names.values()))
        self._places = (ctypes.c_void_p * self._count)(*(start + at for at in names))
        struct.pack_into("<I", self._buffer, _OFFSET_EFER, _EFER)
        self._written = (ctypes.c_uint64 * 5)()
        place = ctypes.addressof(self._written)
        self._write_places = (ctypes.c_void_p * 5)(*(place + 8 * at for at in range(5)))
        self._write_ids = (ctypes.c_int * 5)()
        written = ("rax", "rbx", "rcx", "rdx", "rip")
        self._targets = [_register_id(_unicorn_name(name, wide)) for name in written]

    def read(self) -> Snapshot:
        """All of them, now. Raises `unicorn.UcError`."""
        status = uclib.uc_reg_read_batch(self._handle, self._ids, self._places, self._count)
        if status:
            raise UcError(status)
        *plain, cs, gdt, gdt_limit, ldt, ldt_limit = _LAYOUT.unpack_from(self._buffer)
        return Snapshot(Registers(*plain), cs, (gdt, gdt_limit), (ldt, ldt_limit))

    def write(self, writes: RegisterWrites, *, move: bool) -> None:
        """Write what is not `None`; the instruction pointer only to `move` it.

        Writing it makes Unicorn leave its translated code, so it is not done where the
        emulator moves on by itself. Raises `unicorn.UcError`.
        """
        count = 0
        values = (writes.rax, writes.rbx, writes.rcx, writes.rdx, writes.rip if move else None)
        for target, value in zip(self._targets, values, strict=True):
            if value is not None:
                self._write_ids[count] = target
                self._written[count] = value
                count += 1
        if count:
            status = uclib.uc_reg_write_batch(
                self._handle, self._write_ids, self._write_places, count
            )
            if status:
                raise UcError(status)


def _unicorn_name(name: str, wide: bool) -> str:
    if name in _NAMED:
        return name.upper() if wide else f"E{name[1:].upper()}"
    return {"rflags": "EFLAGS", "efer": "MSR"}.get(name, name.upper())


def _register_id(name: str) -> int:
    number: int = getattr(x86_const, f"UC_X86_REG_{name}")
    return number
