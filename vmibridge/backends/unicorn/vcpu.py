"""One vCPU in Unicorn: its hooks, its traps, and how it ends.

Everything here runs in the vCPU's own thread, but for `stop` and what is called while
the vCPU waits for an answer. Unicorn delivers no exceptions to a guest, so whatever
would raise one ends the vCPU, with a diagnosis.
"""

import mmap
from collections.abc import Iterator

from unicorn import UC_ARCH_X86, Uc, UcError, x86_const
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import uc_tb

from vmibridge.backends.threads import VcpuSlot
from vmibridge.backends.unicorn.code import Freeze, TranslatedCode, UnicornPages
from vmibridge.backends.unicorn.registers import Snapshot, UnicornRegisters
from vmibridge.bridge.registers import magic_of
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.arch.x86.code import (
    CodeSegment,
    segment_of_descriptor,
    segment_of_mode,
)
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap, is_locked
from vmibridge.vm.arch.x86.paging import walk
from vmibridge.vm.arch.x86.registers import CR0_PG
from vmibridge.vm.arch.x86.segment import DESCRIPTOR_SIZE, ring_of
from vmibridge.vm.backend import VcpuEnd
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapFilter, TrapReason

_MODES = {64: uc.UC_MODE_64, 32: uc.UC_MODE_32, 16: uc.UC_MODE_16}
_INVALID_ACCESS = uc.UC_HOOK_MEM_UNMAPPED | uc.UC_HOOK_MEM_PROT
_ACCESS_WORDS = {
    uc.UC_MEM_READ_UNMAPPED: "read of",
    uc.UC_MEM_WRITE_UNMAPPED: "write to",
    uc.UC_MEM_FETCH_UNMAPPED: "jump to",
}
# Intel SDM volume 3, table 6-1.
_EXCEPTIONS = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM",
}  # fmt: skip
_PAGE = 4096
_TF = 1 << 8
_DB = 1
_MAX_WALKS = 64


class UnicornVcpu:
    """One vCPU over shared physical memory at `ram`."""

    def __init__(
        self, number: int, width: int, ram: mmap.mmap, ram_address: int, vm: str, seq: Iterator[int]
    ) -> None:
        self.number = number
        self.engine: Uc = Uc(UC_ARCH_X86, _MODES[width])
        self.engine.mem_map_ptr(0, len(ram), uc.UC_PROT_ALL, ram_address)
        self.engine.ctl_exits_enabled(True)  # with none set: only HLT ends the guest
        self._registers = UnicornRegisters(self.engine, width)
        self._pages = UnicornPages(self.engine)
        self._width = width
        self._ram = ram
        self._vm = vm
        self._seq = seq
        self._stopping = False
        self._diagnosis = ""
        self.code: TranslatedCode = TranslatedCode(self.engine, self._pages, ram)
        self._frozen: Freeze | None = None
        self._walks: dict[tuple[int, int], tuple[int, list[tuple[int, bytes]]]] = {}
        self._hooks = [
            self.engine.hook_add(
                uc.UC_HOOK_INSN, self._on_cpuid, None, 1, 0, x86_const.UC_X86_INS_CPUID
            ),
            self.engine.hook_add(uc.UC_HOOK_INSN_INVALID, self._on_invalid),
            self.engine.hook_add(uc.UC_HOOK_INTR, self._on_interrupt),
            self.engine.hook_add(_INVALID_ACCESS, self._on_invalid_access),
            self.engine.hook_add(uc.UC_HOOK_EDGE_GENERATED, self._on_translated),
        ]
        self._traps: TrapFilter
        self._slot: VcpuSlot

    def run(self, entry: int, traps: TrapFilter, slot: VcpuSlot) -> VcpuEnd:
        """Run from the linear address `entry` until the guest halts, fails, or `stop`."""
        self._traps = traps
        self._slot = slot
        linear = entry
        while not self._stopping:
            try:
                # The hook sees what follows another block. The first is within its page, but for
                # the end of its last instruction.
                self.code.note(linear, _PAGE - linear % _PAGE + MAX_INSTRUCTION)
                self.engine.emu_start(entry, 0)
            except UcError as error:
                # While frozen, code fails that should not run, and that is undone: no diagnosis.
                if self._frozen is None:
                    self._diagnosis = self._diagnosis or f"{error} at {self._where()}"
            if self._frozen is None:
                break
            entry, linear = self._thaw()
            if self._diagnosis:
                break
        reason = "crashed" if self._diagnosis else "stopped" if self._stopping else "halted"
        registers = self._registers.read().registers
        names = Registers.__struct_fields__
        return VcpuEnd(
            self.number, reason, self._diagnosis, {name: getattr(registers, name) for name in names}
        )

    def stop(self) -> None:
        """From any thread: end the run soon. To be repeated until it has ended: one that
        comes before the run has begun has no effect on it."""
        self._stopping = True
        self.engine.emu_stop()

    def close(self) -> None:
        """Free the emulator. The vCPU must not run."""
        for hook in self._hooks:
            self.engine.hook_del(hook)
        del self.engine

    # --- hooks ---------------------------------------------------------------------

    def _on_cpuid(self, _engine: Uc, _data: object) -> bool:
        """Whether the instruction is done; otherwise Unicorn runs it natively."""
        if self._frozen is not None:
            # In the rest of a block that is undone: its CPUID is no trap.
            return True
        state = self._registers.read()
        is_ours = self._traps.wants(TrapReason.CPUID, state.registers.rax)
        if not is_ours and not self.code.may_lock:
            # Without decoding it: what is not ours is decoded only to find a LOCK.
            return False
        segment = self._code_segment(state)
        code = self._code_at(state, segment)
        found = decode_trap(code, segment.width)
        if found is None and is_locked(code, segment.width):
            # Unicorn's own CPUID knows no LOCK.
            self._diagnosis = f"undefined instruction at {self._where()}"
            self._freeze(state.registers, state.registers.rip)
            return True
        if not is_ours:
            return False
        _, length = found or (TrapReason.CPUID, 2)
        writes = self._ask(self._event(TrapReason.CPUID, state, segment, length))
        if writes is None:
            return self._stopping
        self._registers.write(writes, move=False)
        behind = state.registers.rip + length
        if self.code.drop_written(lambda: segment.linear(behind)):
            self._freeze(state.registers, writes.rip)
            if state.registers.rflags & _TF:
                self._on_exception(_DB)
        return True

    def _on_invalid(self, _engine: Uc, _data: object) -> bool:
        """Whether the guest goes on; otherwise it ends here."""
        if self._frozen is not None:
            return False
        state = self._registers.read()
        segment = self._code_segment(state)
        found = decode_trap(self._code_at(state, segment), segment.width)
        if found is None or found[0] is TrapReason.CPUID:
            self._diagnosis = f"undefined instruction at {self._where()}"
            return False
        reason, length = found
        event = self._event(reason, state, segment, length)
        magic = magic_of(event)
        why = "no handler claims"
        if self._traps.wants(reason, magic):
            writes = self._ask(event)
            if writes is not None:
                self._registers.write(writes, move=True)
                if state.registers.rflags & _TF:
                    # Unicorn would raise it behind the next instruction.
                    self._on_exception(_DB)
                    return False
                if self.code.drop_written(lambda: None):
                    self._freeze(state.registers, writes.rip)
                return True
            if self._stopping:
                return True
            why = "runs natively, as one that is denied may"
        self._diagnosis = (
            f"{reason.value} that {why} (magic {magic:#x}) at {self._where()}:"
            " Unicorn delivers no #UD to a guest"
        )
        return False

    def _on_interrupt(self, engine: Uc, number: int, _data: object) -> None:
        if self._frozen is None:
            self._on_exception(number)
        engine.emu_stop()

    def _on_exception(self, number: int) -> None:
        name = f"exception {number} ({_EXCEPTIONS[number]})" if number in _EXCEPTIONS else ""
        self._diagnosis = (
            f"{name or f'interrupt {number:#x}'} at {self._where()}:"
            " Unicorn delivers no exceptions to a guest"
        )

    def _on_invalid_access(
        self, _engine: Uc, access: int, address: int, _size: int, _value: int, _data: object
    ) -> bool:
        if self._frozen is not None:
            return False
        words = _ACCESS_WORDS.get(access, "access to")
        self._diagnosis = f"{words} {address:#x}, where there is no memory, at {self._where()}"
        return False

    def _ask(self, event: TrapEvent) -> RegisterWrites | None:
        try:
            answered, writes = self._slot.ask(event)
        except RuntimeError:  # the event loop is gone: no trap can be answered
            answered, writes = False, None
        if not answered:
            self._stopping = True
            self.engine.emu_stop()
        return writes

    # --- translated code -----------------------------------------------------------

    def _on_translated(self, _engine: Uc, block: uc_tb, _before: uc_tb, _data: object) -> None:
        self.code.note(block.pc, block.size)

    def _freeze(self, registers: Registers, rip: int) -> None:
        """End this run, with the vCPU as it is now and at `rip`."""
        self._registers.write(RegisterWrites(rip), move=True)
        self._frozen = Freeze(self.engine, self._ram, registers.rflags)

    def _thaw(self) -> tuple[int, int]:
        """Between two runs; returns where the next one begins, as Unicorn wants it and linear."""
        assert self._frozen is not None
        self._frozen.thaw()
        self._frozen = None
        self.code.forget()
        state = self._registers.read()
        rip = state.registers.rip
        # A vCPU that began in 16 bits wants what is linear in real mode; others the offset.
        entry = rip + (state.cs << 4 if self._width == 16 else 0)
        return entry, self._code_segment(state).linear(rip)

    # --- the trapping instruction --------------------------------------------------

    def _event(
        self, reason: TrapReason, state: Snapshot, segment: CodeSegment, length: int
    ) -> TrapEvent:
        registers = state.registers
        return TrapEvent(
            seq=next(self._seq),
            reason=reason,
            registers=registers,
            vm=self._vm,
            vcpu=self.number,
            ip=registers.rip,
            length=length,
            width=segment.width,
            ring=ring_of(state.cs, registers.cr0, registers.rflags),
        )

    def _code_segment(self, state: Snapshot) -> CodeSegment:
        """The segment of the code that runs."""
        registers = state.registers
        segment = segment_of_mode(state.cs, registers.cr0, registers.rflags)
        if segment is not None:
            return segment
        descriptor = self._descriptor(state)
        if descriptor is None:
            return CodeSegment(0, self._width)
        return segment_of_descriptor(descriptor, registers.efer)

    def _descriptor(self, state: Snapshot) -> int | None:
        """The descriptor of CS; `None` before the guest has loaded one of its own."""
        base, limit = state.ldt if state.cs & 4 else state.gdt
        offset = state.cs & 0xFFF8
        # The first entry of a GDT is no descriptor; that of an LDT is.
        if not state.cs & 0xFFFC or offset + DESCRIPTOR_SIZE - 1 > limit:
            return None
        raw = self._read_linear(state.registers, base + offset, DESCRIPTOR_SIZE)
        return int.from_bytes(raw, "little") if len(raw) == DESCRIPTOR_SIZE else None

    def _code_at(self, state: Snapshot, segment: CodeSegment) -> bytes:
        """Up to 15 bytes at the instruction pointer, fewer where no code can be fetched."""
        found = b""
        while len(found) < MAX_INSTRUCTION:
            physical = self._pages.physical(segment.linear(state.registers.rip + len(found)))
            if physical is None or physical >= len(self._ram):
                break
            size = min(MAX_INSTRUCTION - len(found), _PAGE - physical % _PAGE)
            found += self._ram[physical : physical + size]
        return found

    def _read_linear(self, registers: Registers, address: int, size: int) -> bytes:
        """Up to `size` bytes of data of ring 0, fewer where the mapping ends."""
        found = b""
        while len(found) < size:
            at = address + len(found)
            physical = self._translate(registers, at)
            if physical is None:
                break
            end = min(physical + size - len(found), (physical | _PAGE - 1) + 1, len(self._ram))
            if end <= physical:
                break
            found += self._ram[physical:end]
        return found

    def _translate(self, registers: Registers, address: int) -> int | None:
        if not registers.cr0 & CR0_PG:
            return address
        key = (registers.cr3, address // _PAGE)
        ram = self._ram
        # A TLB that cannot be stale: a walk is used again only if each entry on it is as it was.
        known = self._walks.get(key)
        if known is None or any(ram[at : at + len(was)] != was for at, was in known[1]):
            known = self._walk(registers, address)
            if known is None:
                self._walks.pop(key, None)
                return None
            if len(self._walks) >= _MAX_WALKS:
                self._walks.clear()
            self._walks[key] = known
        return known[0] * _PAGE + address % _PAGE

    def _walk(
        self, registers: Registers, address: int
    ) -> tuple[int, list[tuple[int, bytes]]] | None:
        """The frame of a page, and the entries that lead there with their addresses."""
        entries: list[tuple[int, bytes]] = []
        steps = walk(registers, address)
        try:
            place, size = next(steps)
            while True:
                entry = self._ram[place : place + size]
                entries.append((place, entry))
                place, size = steps.send(int.from_bytes(entry, "little"))
        except StopIteration as found:
            return found.value.physical // _PAGE, entries
        except GuestMemoryError:
            return None

    def _where(self) -> str:
        state = self._registers.read()
        code = self._code_at(state, self._code_segment(state))[:8].hex(" ") or "no code there"
        return f"{state.registers.rip:#x} ({code})"
