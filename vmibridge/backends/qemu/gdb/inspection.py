"""What a vCPU at a breakpoint is about to execute: which trap instruction, in how wide code.

- A breakpoint is at a linear address, and RIP is an offset in the code segment. The segment's base
  and width are those that the processor has loaded, which QEMU's monitor shows. That takes long,
  so it is asked as seldom as can be: registers may show that the code is 64-bit; a descriptor that
  is still as it was when its segment was looked up gives the same segment. A selector in the LDT
  is looked up each time.
- The code is read at each stop. What is decoded once is known as long as the bytes stay the same.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from vmibridge.backends.qemu.gdb.commands import Stop
from vmibridge.backends.qemu.gdb.memory import QemuMemory
from vmibridge.backends.qemu.gdb.monitor import ALL_REGISTERS, Tables, parse_tables
from vmibridge.backends.qemu.gdb.registers import (
    FRAME_SIZE,
    Frame,
    RegisterLayout,
    parse_frame,
)
from vmibridge.backends.qemu.gdb.skipping import unpatched
from vmibridge.vm.arch.x86.code import (
    CODE_64,
    CodeSegment,
    segment_of_cache,
    segment_of_descriptor,
    segment_of_mode,
)
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.vm.arch.x86.registers import EFER_LMA
from vmibridge.vm.arch.x86.segment import DESCRIPTOR_SIZE
from vmibridge.vm.trap import Registers, TrapReason

log: logging.Logger = logging.getLogger(__name__)

_MAX_KNOWN = 4096
_RFLAGS_RF = 1 << 16
_LOOK_BACK = 8
"""Bytes before a trap that may belong to a MOV SS."""
_INT3 = b"\xcc"


class Code(NamedTuple):
    """A trap instruction."""

    reason: TrapReason
    length: int
    width: int
    address: int
    """Linear."""
    in_shadow: bool = False
    """Whether the instruction before it may be a STI or a load of SS."""
    patched: bool = False
    """Whether a client that left has replaced it by one that does nothing."""


class Window(NamedTuple):
    """A trap instruction in 64-bit code, and the bytes that it was found in."""

    start: int
    data: bytes
    code: Code


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
    point: int | None = None
    """The linear address of the breakpoint; `None`: it is not known which."""


class Inspector:
    """Looks at the code and the tables of one VM, while it stands still."""

    def __init__(
        self,
        vm: str,
        memory: QemuMemory,
        monitor: Callable[[str], Awaitable[str]],
        points: Sequence[int],
        ud_handler: int | None,
        layout: RegisterLayout,
    ) -> None:
        self.vm = vm
        self.points = points
        """Where breakpoints are."""
        self.ud_handler = ud_handler
        """The one of them at the handler of undefined instructions."""
        self.saved: dict[int, bytes] = {}
        """The code at software breakpoints that change memory."""
        self.trapped: set[int] = set()
        """Breakpoints that were met by trap instructions."""
        self.others: dict[int, bytes] = {}
        """Sites that were met as something else, and the first bytes of what."""
        self._memory = memory
        self._monitor = monitor
        self._layout = layout
        self._windows: dict[int, Window] = {}
        self._segments: dict[tuple[int, ...], tuple[bytes, CodeSegment]] = {}
        self._tables: dict[int, Tables] = {}
        self._warned: set[int] = set()

    def forget(self) -> None:
        """The VM begins again."""
        self._windows.clear()
        self._segments.clear()
        self._tables.clear()

    def window(self, point: int) -> Window | None:
        """What was found at a breakpoint before."""
        return self._windows.get(point)

    def known(self, registers: Registers, window: Window, read: bytes | None) -> Code | None:
        """The trap, if a vCPU stands where the window is, and its bytes are still the same."""
        if (
            registers.rip == window.code.address
            and read == window.data
            and self._layout.shows_64_bits(registers)
        ):
            return window.code
        return None

    async def look(self, where: Where, vcpu: int) -> tuple[Where, Code | None]:
        """The trap at a breakpoint; `None`: there is none of ours. Raises `ClientLostError`."""
        segment = await self._segment(where, vcpu)
        address = segment.linear(where.registers.rip)
        if address not in self.points:
            self._warn(address, "stopped where there is no site of ours")
            return where, None
        where = where._replace(point=address)
        if address == self.ud_handler:
            raised = await self._look_behind(where)
            if raised is None:
                return where, None
            where = raised
            segment = await self._described(where, vcpu)
        return where, await self._code_at(where, segment)

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
        # RF is pushed set for every fault: it says nothing of the code that trapped.
        frame = frame._replace(flags=frame.flags & ~_RFLAGS_RF)
        before = msgspec.structs.replace(registers, rsp=frame.sp, rip=frame.ip, rflags=frame.flags)
        return where._replace(registers=before, cs=frame.cs & 0xFFFF, frame=frame)

    async def _code_at(self, where: Where, segment: CodeSegment) -> Code | None:
        address = segment.linear(where.registers.rip)
        # Where nothing is mapped before it, nothing was executed there.
        before = await self._memory.read_virtual(address - _LOOK_BACK, _LOOK_BACK) or b""
        read = code = await self._memory.read_code(address, MAX_INSTRUCTION)
        saved = self.saved.get(address)
        if saved is not None and code[:1] == _INT3:
            code = saved[:1] + code[1:]
        found = decode_trap(code, segment.width)
        patched = False
        if found is None and (restored := unpatched(code, segment.width)) is not None:
            found, patched = decode_trap(restored, segment.width), True
        if found is None or (where.frame is not None and found[0] is TrapReason.CPUID):
            if where.frame is None:
                self.others.setdefault(address, code[:3])
                self._warn(address, f"no trap instruction there, but {code[:3].hex(' ') or 'none'}")
            return None
        if where.point is not None:
            self.trapped.add(where.point)
        result = Code(*found, segment.width, address, _may_shadow(before), patched)
        self._windows.pop(address, None)
        # What `known` can tell by RIP and these bytes alone: RIP is linear in 64-bit code only, and
        # under a breakpoint or a patch memory does not show the guest's own instruction.
        if where.frame is None and segment.width == 64 and saved is None and not patched:
            if len(self._windows) >= _MAX_KNOWN:
                self._windows.clear()
            self._windows[address] = Window(
                address - len(before), before + read[: found[1]], result
            )
        return result

    def _warn(self, address: int, what: str) -> None:
        if address not in self._warned and len(self._warned) < 64:
            self._warned.add(address)
            log.warning("vm %s: at %#x: %s", self.vm, address, what)

    # --- segments ------------------------------------------------------------------

    async def _segment(self, where: Where, vcpu: int) -> CodeSegment:
        """The code segment that a vCPU runs in."""
        registers, cs = where.registers, where.cs
        if self._layout.shows_64_bits(registers):
            return CODE_64
        real = segment_of_mode(cs, registers.cr0, registers.rflags)
        if real is not None and real.linear(registers.rip) in self.points:
            return real
        key = (vcpu, cs, registers.cr0, registers.cr3, registers.cr4, registers.efer)
        tables = self._tables.get(vcpu)
        if tables is not None and key in self._segments and real is None and not cs & 4:
            descriptor = await self._memory.read_virtual(_place(tables, cs), DESCRIPTOR_SIZE)
            before, segment = self._segments[key]
            if descriptor == before and segment.linear(registers.rip) in self.points:
                return segment
        tables = await self._look_up(vcpu)
        if tables is None or tables.flags is None:
            return real or CodeSegment(0, 64 if registers.efer & EFER_LMA else 32)
        segment = segment_of_cache(tables.base, tables.flags, registers.efer)
        descriptor = await self._memory.read_virtual(_place(tables, cs), DESCRIPTOR_SIZE)
        # The table may have changed since the segment was loaded. Then the descriptor that is there
        # now cannot stand for it the next time.
        if descriptor is not None and _segment_of(descriptor, registers.efer) == segment:
            if len(self._segments) >= _MAX_KNOWN:
                self._segments.clear()
            self._segments[key] = descriptor, segment
        return segment

    async def _described(self, where: Where, vcpu: int) -> CodeSegment:
        """The segment of a selector that was pushed, from its descriptor."""
        tables = self._tables.get(vcpu)
        if tables is None or where.cs & 4:
            tables = await self._look_up(vcpu)
        if tables is not None:
            descriptor = await self._memory.read_virtual(_place(tables, where.cs), DESCRIPTOR_SIZE)
            if descriptor is not None:
                return _segment_of(descriptor, where.registers.efer)
        return CODE_64

    async def _look_up(self, vcpu: int) -> Tables | None:
        tables = parse_tables(await self._monitor(ALL_REGISTERS), vcpu)
        if tables is None:
            self._tables.pop(vcpu, None)
        else:
            self._tables[vcpu] = tables
        return tables


def _place(tables: Tables, cs: int) -> int:
    return ((tables.ldt if cs & 4 else tables.gdt) + (cs & ~7)) % (1 << 64)


def _segment_of(descriptor: bytes, efer: int) -> CodeSegment:
    return segment_of_descriptor(int.from_bytes(descriptor, "little"), efer)


def _may_shadow(before: bytes) -> bool:
    """Whether code may end in an STI, POP SS or MOV SS. Not whether it does: it is not decoded."""
    if before[-1:] in (b"\xfb", b"\x17"):
        return True
    pairs = pairwise(before)
    return any(opcode == 0x8E and operand >> 3 & 7 == 2 for opcode, operand in pairs)
