"""One vCPU in Unicorn: its hooks, its traps, and how it ends.

Everything here runs in the vCPU's own thread, but for `stop` and what is called while
the vCPU waits for an answer. Unicorn delivers no exceptions to a guest, so whatever
would raise one ends the vCPU, with a diagnosis.
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from unicorn import UC_ARCH_X86, Uc, UcError, x86_const
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import uc_tb

from vmibridge.arch import magic_of
from vmibridge.arch.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.arch.paging import CR0_PG, walk
from vmibridge.arch.segment import (
    DESCRIPTOR_SIZE,
    base_of,
    is_segmented_16,
    ring_of,
    width_of,
)
from vmibridge.backend.handover import VcpuSlot
from vmibridge.backend.unicorn_registers import Snapshot, UnicornRegisters
from vmibridge.errors import GuestMemoryError
from vmibridge.event import Registers, RegisterWrites, TrapEvent, TrapFilter, TrapReason
from vmibridge.vmi import VcpuEnd

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
_MAX_TRANSLATIONS = 1024
_MAX_ALIASES = 64
"""Virtual pages that one physical page of code is kept track of at: a guest may make any number."""


class CodeSegment(NamedTuple):
    """Where code runs: its address width in bits, its ring, its linear base address."""

    width: int
    ring: int
    base: int


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
        self._width = width
        self._ram = ram
        self._vm = vm
        self._seq = seq
        self._stopping = False
        self._diagnosis = ""
        self.changed_pages: set[int] = set()
        """Physical pages that the host wrote to since this vCPU's last trap."""
        self._code_pages: dict[int, set[int]] = {}
        self._translations: dict[tuple[int, int], int] = {}
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
        self._note_code(self._registers.read().registers, entry)
        if not self._stopping:
            try:
                self.engine.emu_start(entry, 0)
            except UcError as error:
                self._diagnosis = self._diagnosis or f"{error} at {self._where()}"
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
        state = self._registers.read()
        if not self._traps.wants(TrapReason.CPUID, state.registers.rax):
            return False
        segment = self._code_segment(state)
        _, length = self._trap_at(state, segment) or (TrapReason.CPUID, 2)
        writes = self._ask(self._event(TrapReason.CPUID, state, segment, length))
        if writes is None:
            return self._stopping
        self._registers.write(writes, move=False)
        return True

    def _on_invalid(self, _engine: Uc, _data: object) -> bool:
        """Whether the guest goes on; otherwise it ends here."""
        state = self._registers.read()
        segment = self._code_segment(state)
        found = self._trap_at(state, segment)
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
        name = f"exception {number} ({_EXCEPTIONS[number]})" if number in _EXCEPTIONS else ""
        self._diagnosis = (
            f"{name or f'interrupt {number:#x}'} at {self._where()}:"
            " Unicorn delivers no exceptions to a guest"
        )
        engine.emu_stop()

    def _on_invalid_access(
        self, _engine: Uc, access: int, address: int, _size: int, _value: int, _data: object
    ) -> bool:
        words = _ACCESS_WORDS.get(access, "access to")
        self._diagnosis = f"{words} {address:#x}, where there is no memory, at {self._where()}"
        return False

    def _ask(self, event: TrapEvent) -> RegisterWrites | None:
        try:
            answered, writes = self._slot.ask(event)
        except RuntimeError:  # the event loop is gone: there is nobody to run for
            answered, writes = False, None
        if not answered:
            self._stopping = True
            self.engine.emu_stop()
        while self.changed_pages:
            self._forget_code(self.changed_pages.pop())
        return writes

    # --- translated code -----------------------------------------------------------
    #
    # Unicorn runs a guest's code in translated form and sees the guest's own writes to
    # it, but not the host's. Flushing all of it is not safe inside a hook (a CPUID hook
    # runs in the middle of a translated block), dropping a page's is.

    def _on_translated(self, _engine: Uc, block: uc_tb, _before: uc_tb, _data: object) -> None:
        self._note_code(self._registers.read().registers, block.pc)

    def _note_code(self, registers: Registers, address: int) -> None:
        physical = self._translate(registers, address)
        if physical is None:
            return
        aliases = self._code_pages.setdefault(physical // _PAGE, set())
        aliases.add(address // _PAGE)
        if len(aliases) > _MAX_ALIASES:
            # It is translated, and noted, anew when it runs again.
            self._forget_code(physical // _PAGE)

    def _forget_code(self, page: int) -> None:
        for virtual in self._code_pages.pop(page, ()):
            self.engine.ctl_remove_cache(virtual * _PAGE, (virtual + 1) * _PAGE)

    # --- the trapping instruction --------------------------------------------------

    def _event(
        self, reason: TrapReason, state: Snapshot, segment: CodeSegment, length: int
    ) -> TrapEvent:
        return TrapEvent(
            seq=next(self._seq),
            reason=reason,
            registers=state.registers,
            vm=self._vm,
            vcpu=self.number,
            ip=state.registers.rip,
            length=length,
            width=segment.width,
            ring=segment.ring,
        )

    def _code_segment(self, state: Snapshot) -> CodeSegment:
        """The segment of the code that runs."""
        registers = state.registers
        ring = ring_of(state.cs, registers.cr0, registers.rflags)
        if is_segmented_16(registers.cr0, registers.rflags):
            return CodeSegment(16, ring, state.cs << 4)
        descriptor = self._descriptor(state)
        if descriptor is None:
            return CodeSegment(self._width, ring, 0)
        width = width_of(descriptor, registers.efer)
        # 64-bit code has no base, whatever its descriptor says.
        return CodeSegment(width, ring, 0 if width == 64 else base_of(descriptor))

    def _descriptor(self, state: Snapshot) -> int | None:
        """The descriptor of CS; `None` before the guest has loaded one of its own."""
        base, limit = state.ldt if state.cs & 4 else state.gdt
        offset = state.cs & 0xFFF8
        if not offset or offset + DESCRIPTOR_SIZE - 1 > limit:
            return None
        raw = self._read_linear(state.registers, base + offset, DESCRIPTOR_SIZE)
        return int.from_bytes(raw, "little") if len(raw) == DESCRIPTOR_SIZE else None

    def _code_at(self, state: Snapshot, segment: CodeSegment) -> bytes:
        address = segment.base + state.registers.rip
        if segment.width != 64:
            address &= 0xFFFF_FFFF
        return self._read_linear(state.registers, address, MAX_INSTRUCTION)

    def _trap_at(self, state: Snapshot, segment: CodeSegment) -> tuple[TrapReason, int] | None:
        found = decode_trap(self._code_at(state, segment), segment.width)
        if found is None and self._translations:
            # The guest may have changed its page tables since.
            self._translations.clear()
            found = decode_trap(self._code_at(state, segment), segment.width)
        return found

    def _read_linear(self, registers: Registers, address: int, size: int) -> bytes:
        """Up to `size` bytes, fewer where the mapping ends."""
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
        frame = self._translations.get(key)
        if frame is None:
            steps = walk(registers, address)
            try:
                place, size = next(steps)
                while True:
                    entry = self._ram[place : place + size]
                    place, size = steps.send(int.from_bytes(entry, "little"))
            except StopIteration as found:
                frame = found.value.physical // _PAGE
            except GuestMemoryError:
                return None
            if len(self._translations) >= _MAX_TRANSLATIONS:
                self._translations.clear()
            self._translations[key] = frame
        return frame * _PAGE + address % _PAGE

    def _where(self) -> str:
        state = self._registers.read()
        code = self._code_at(state, self._code_segment(state))[:8].hex(" ") or "no code there"
        return f"{state.registers.rip:#x} ({code})"
