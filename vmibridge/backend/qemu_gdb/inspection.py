"""What a vCPU at a breakpoint is about to execute: which trap instruction, in how wide code.

What was found once is kept: for each address in each address space, and for each selector.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec

from vmibridge.arch.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.arch.segment import DESCRIPTOR_SIZE, EFER_LMA, is_segmented_16, width_of
from vmibridge.backend.qemu_gdb.commands import Stop
from vmibridge.backend.qemu_gdb.memory import QemuMemory
from vmibridge.backend.qemu_gdb.regions import ALL_REGISTERS, parse_tables
from vmibridge.backend.qemu_gdb.registers import FRAME_SIZE, Frame, parse_frame
from vmibridge.event import Registers, TrapReason

log: logging.Logger = logging.getLogger(__name__)

_MOST_KNOWN = 4096
_RFLAGS_RF = 1 << 16


class Code(NamedTuple):
    """A trap instruction in an address space."""

    reason: TrapReason
    length: int
    width: int


class Where(NamedTuple):
    """A vCPU at a breakpoint."""

    stop: Stop
    data: bytes
    """The registers as they came."""
    registers: Registers
    """Those of the trapping code."""
    cs: int
    frame: Frame | None = None
    """Of the exception that the trap has raised."""


class Inspector:
    """Looks at the code and the tables of one VM, while it stands still."""

    def __init__(
        self,
        vm: str,
        memory: QemuMemory,
        monitor: Callable[[str], Awaitable[str]],
        points: Sequence[int],
        ud_handler: int | None,
    ) -> None:
        self.vm = vm
        self.points = points
        """Where breakpoints are."""
        self.ud_handler = ud_handler
        """The one of them at the handler of undefined instructions."""
        self.saved: dict[int, bytes] = {}
        """The code at software breakpoints that change memory."""
        self._memory = memory
        self._monitor = monitor
        self._known: dict[tuple[int, int, int], Code] = {}
        self._widths: dict[tuple[int, int], int] = {}
        self._warned: set[int] = set()

    def forget(self) -> None:
        """The VM begins anew."""
        self._known.clear()
        self._widths.clear()

    def known(self, registers: Registers, cs: int) -> Code | None:
        """What was found there before."""
        return self._known.get((registers.rip, registers.cr3 >> 12, cs))

    async def look(self, where: Where, vcpu: int) -> tuple[Where, Code] | None:
        """The trap at a breakpoint; `None`: there is none of ours. Raises `ClientLostError`."""
        if where.registers.rip == self.ud_handler:
            raised = await self._look_behind(where)
            if raised is None:
                return None
            where = raised
        code = await self._code_at(where, vcpu)
        if code is None:
            return None
        if where.frame is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            registers = where.registers
            self._known[registers.rip, registers.cr3 >> 12, where.cs] = code
        return where, code

    async def _look_behind(self, where: Where) -> Where | None:
        """Whose trap has raised the exception that a vCPU is about to handle."""
        registers = where.registers
        if not registers.efer & EFER_LMA:
            self._warn(registers.rip, "the #UD handler of a guest that is not in 64-bit mode")
            return None
        pushed = await self._memory.read_virtual(registers.rsp, FRAME_SIZE)
        if pushed is None:
            return None
        frame = parse_frame(pushed)
        frame = frame._replace(flags=frame.flags & ~_RFLAGS_RF)
        before = msgspec.structs.replace(registers, rsp=frame.sp, rip=frame.ip, rflags=frame.flags)
        return Where(where.stop, where.data, before, frame.cs & 0xFFFF, frame)

    async def _code_at(self, where: Where, vcpu: int) -> Code | None:
        registers = where.registers
        address = registers.rip
        if where.frame is None and address not in self.points:
            self._warn(address, "stopped where there is no site of ours")
            return None
        width = await self._width(where, vcpu)
        code = self.saved.get(address) or await self._memory.read_code(address, MAX_INSTRUCTION)
        found = decode_trap(code, width)
        if found is None or (where.frame is not None and found[0] is TrapReason.CPUID):
            if where.frame is None:
                self._warn(address, f"no trap instruction there, but {code[:3].hex(' ') or 'none'}")
            return None
        return Code(*found, width)

    def _warn(self, address: int, what: str) -> None:
        if address not in self._warned and len(self._warned) < 64:
            self._warned.add(address)
            log.warning("vm %s: at %#x: %s", self.vm, address, what)

    async def _width(self, where: Where, vcpu: int) -> int:
        registers, cs = where.registers, where.cs
        if is_segmented_16(registers.cr0, registers.rflags):
            return 16
        own = registers.cr3 >> 12 if cs & 4 else 0
        key = cs | (registers.efer & EFER_LMA) << 16, own
        width = self._widths.get(key)
        if width is None:
            width = await self._look_up_width(where, vcpu)
            if len(self._widths) >= _MOST_KNOWN:
                self._widths.clear()
            self._widths[key] = width
        return width

    async def _look_up_width(self, where: Where, vcpu: int) -> int:
        text = await self._monitor(ALL_REGISTERS)
        tables = parse_tables(text, vcpu)
        if tables is not None:
            table = tables.ldt if where.cs & 4 else tables.gdt
            place = (table + (where.cs & ~7)) % (1 << 64)
            descriptor = await self._memory.read_virtual(place, DESCRIPTOR_SIZE)
            if descriptor is not None:
                return width_of(int.from_bytes(descriptor, "little"), where.registers.efer)
        return 64 if where.registers.efer & EFER_LMA else 32
