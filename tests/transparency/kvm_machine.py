"""The reference against a real processor: programs on KVM, whose traps are OUT instructions.

KVM shows user space neither CPUID nor VMCALL. An OUT of as many bytes stands for each trap: it
leaves the guest, RIP is behind it then, and the answer is written to registers.

| trap | instead |
|---|---|
| CPUID | OUT 10h, AL |
| VMCALL | DS: OUT 12h, AL |
| VMMCALL | DS: OUT 13h, AL |
| INT at the end | OUT 14h, AL |

Programs are left out that have a VMCALL which is not ours: it would have to be #UD.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import replace
from typing import Self

from transparency import layout
from transparency.alu import AF, IOPL
from transparency.host import compare_result
from transparency.processor import RAX, RBP, RCX, STRING_ORDER
from transparency.program import Linked, Program
from transparency.records import Shown
from transparency.steps import Branch, Patchable, Plain, Step

DEVICE = "/dev/kvm"
_PORTS = {0x10: "cpuid", 0x12: "vmcall", 0x13: "vmmcall"}
_INSTEAD = (
    (b"\x0f\x01\xc1", b"\x3e\xe6\x12"),
    (b"\x0f\x01\xd9", b"\x3e\xe6\x13"),
    (b"\x0f\xa2", b"\xe6\x10"),
)
_END = bytes([0xE6, 0x14])
"""In the place of INT, which KVM does not deliver here."""
# linux/kvm.h
_CREATE_VM, _CREATE_IRQCHIP, _CREATE_VCPU, _VCPU_MMAP_SIZE, _RUN = (
    0xAE01,
    0xAE60,
    0xAE41,
    0xAE04,
    0xAE80,
)
_SET_MEMORY, _GET_REGS, _SET_REGS = 0x4020AE46, 0x8090AE81, 0x4090AE82
_GET_SREGS, _SET_SREGS, _GET_CPUID, _SET_CPUID = 0x8138AE83, 0x4138AE84, 0xC008AE05, 0x4008AE90
_EXIT_IO, _EXIT_INTERNAL_ERROR = 2, 17
_KVM_ORDER = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
"""RAX RBX RCX RDX RSI RDI RSP RBP, by their numbers."""


class _NotEmulatedError(Exception):
    pass


def af_of_shifts() -> int:
    """What this processor makes of AF after a shift, which the manuals leave undefined: it is 0 on
    Intel's and the flag on AMD's. Found by a shift of its own, as in a guest of KVM it is the same
    processor."""
    # xor eax, eax; shl eax, 1; pushfq; pop rax; ret
    code = b"\x31\xc0\xd1\xe0\x9c\x58\xc3"
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as at:
        at.write(code)
        place = ctypes.c_char.from_buffer(at)
        shift = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
        flags = int(shift())
        del place
    return flags & AF


class KvmMachine:
    """Runs programs one after the other, on one vCPU."""

    def __init__(self) -> None:
        self._open: list[int] = []
        self.compared = 0
        """Programs that ran; the others are not for KVM."""
        self._ram = mmap.mmap(-1, 4 << 20)
        image, self._behind = layout.loader(kvm=True)
        self._ram[layout.IMAGE : layout.IMAGE + len(image)] = image

    async def __aenter__(self) -> Self:
        return self

    def _start(self) -> None:
        # A VM for each program: page tables that the host writes are not seen by a KVM that shadows
        # them.
        self._close()
        kvm = self._keep(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        vm = self._keep(fcntl.ioctl(kvm, _CREATE_VM, 0))
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        fcntl.ioctl(vm, _SET_MEMORY, struct.pack("IIQQQ", 0, 0, 0, len(self._ram), place))
        fcntl.ioctl(vm, _CREATE_IRQCHIP, 0)
        self._vcpu = self._keep(fcntl.ioctl(vm, _CREATE_VCPU, 0))
        size = fcntl.ioctl(kvm, _VCPU_MMAP_SIZE, 0)
        self._run_page = mmap.mmap(self._vcpu, size)
        table = bytearray(8 + 40 * 256)
        struct.pack_into("I", table, 0, 256)
        fcntl.ioctl(kvm, _GET_CPUID, table)
        fcntl.ioctl(self._vcpu, _SET_CPUID, table)

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def _keep(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor

    async def run(self, linked: Linked) -> list[str]:
        """What a processor does otherwise than the reference."""
        if not _can_run(linked):
            return []
        try:
            differences = self._compare(linked)
        except _NotEmulatedError:
            return []
        self.compared += 1
        return differences

    def _compare(self, linked: Linked) -> list[str]:
        other = Linked(with_out(linked.program), expected=linked.expected, end=_END)
        self._ram[layout.TABLE_A : layout.LOG] = other.part(layout.TABLE_A, layout.LOG)
        self._ram[layout.CODE : layout.MEMORY_END] = other.part(layout.CODE, layout.MEMORY_END)
        self._start()
        self._begin()
        differences: list[str] = []
        number, shown = 0, linked.expected.shown
        while (reason := self._run()) is not None:
            registers, rip, rflags = self._registers()
            magic = registers[
                RAX if reason == "cpuid" else RCX if linked.start.width == 64 else RBP
            ]
            if magic & 0xFFFF_FFFF != layout.MAGIC:
                if reason != "cpuid":
                    return []
                values: tuple[int | None, ...] = (0, 0, 0, 0)
            else:
                if number >= len(shown):
                    return [
                        *differences,
                        f"trap {number}: {reason} before {rip:#x} must not be one",
                    ]
                differences += _compare(number, reason, rip, rflags, registers, shown[number])
                values, writes = other.answers[number]
                number += 1
                for address, data in writes:
                    self._ram[address : address + len(data)] = data
            for register, value in zip((0, 3, 1, 2), values, strict=True):
                if value is not None:
                    registers[register] = value
            self._set_registers(registers, rip, rflags)
        state = bytearray(self._ram[layout.STATE : layout.RESULT + layout.RESULT_SIZE])
        if self._port == _END[1]:
            registers, rip, rflags = self._registers()
            fields = (
                *registers,
                rip,
                0,
                linked.start.cs,
                rflags,
                linked.start.ss,
                layout.END_VECTOR,
            )
            struct.pack_into("<22Q", state, layout.RESULT - layout.STATE, *fields)
        return differences + list(compare_result(linked, state))

    def _begin(self) -> None:
        sregs = bytearray(312)
        fcntl.ioctl(self._vcpu, _GET_SREGS, sregs)

        def segment(at: int, selector: int, kind: int, *, long: bool) -> None:
            fields = (0, 0xFFFF_FFFF, selector, kind, 1, 0, 0 if long else 1, 1, long, 1, 0)
            struct.pack_into("QIHBBBBBBBB", sregs, at, *fields)

        segment(0, 8, 11, long=True)
        for number in range(1, 6):
            segment(24 * number, 16, 3, long=False)
        task = (layout.TASK, 0x6F, layout.TASK_SELECTOR, 11, 1, 0, 0, 0, 0, 0, 0)
        struct.pack_into("QIHBBBBBBBB", sregs, 24 * 6, *task)
        struct.pack_into("QH", sregs, 24 * 8, layout.GDT, 0x1FF)
        struct.pack_into("QH", sregs, 24 * 8 + 16, layout.IDT, 0xFFF)
        struct.pack_into("Q", sregs, 24 * 8 + 32, 0x8000_0011)
        struct.pack_into("QQ", sregs, 24 * 8 + 48, layout.ROOT_A, 0x20)
        struct.pack_into("Q", sregs, 24 * 8 + 72, 0x500)
        fcntl.ioctl(self._vcpu, _SET_SREGS, bytes(sregs))
        registers = [0] * 16
        registers[0], registers[4] = 1, layout.STACK_OF_LOADER
        self._set_registers(registers, self._behind, 2)

    def _run(self) -> str | None:
        """To the next trap, or the end of the program."""
        # Who stops and continues the process interrupts the vCPU: it has not left for a reason of
        # its own, and goes on.
        while True:
            with suppress(InterruptedError):
                fcntl.ioctl(self._vcpu, _RUN, 0)
                break
        (reason,) = struct.unpack_from("I", self._run_page, 8)
        if reason == _EXIT_INTERNAL_ERROR:
            raise _NotEmulatedError
        assert reason == _EXIT_IO, f"exit {reason}"
        (self._port,) = struct.unpack_from("H", self._run_page, 34)
        return _PORTS.get(self._port)

    def _registers(self) -> tuple[list[int], int, int]:
        data = bytearray(144)
        fcntl.ioctl(self._vcpu, _GET_REGS, data)
        *values, rip, rflags = struct.unpack("18Q", data)
        registers = [0] * 16
        for number, value in zip(_KVM_ORDER, values, strict=True):
            registers[number] = value
        return registers, rip, rflags

    def _set_registers(self, registers: list[int], rip: int, rflags: int) -> None:
        data = struct.pack("18Q", *(registers[number] for number in _KVM_ORDER), rip, rflags)
        fcntl.ioctl(self._vcpu, _SET_REGS, data)


def _can_run(linked: Linked) -> bool:
    """Not an LDT, IOPL and single steps: a KVM that emulates ring 0 does not know them."""
    steps = any(logged.vector == 1 and logged.dr6 == 0x4000 for logged in linked.expected.log)
    return not (linked.program.selector & 4 or linked.program.rflags & IOPL or steps)


def _compare(
    number: int, reason: str, rip: int, rflags: int, registers: list[int], must: Shown
) -> list[str]:
    found = (reason, rip, tuple(registers[at] for at in STRING_ORDER), rflags & ~0x1_0000)
    mask = {64: (1 << 64) - 1, 32: 0xFFFF_FFFF, 16: 0xFFFF}[must.width]
    right = (must.reason, must.ip + must.length & mask, must.registers, must.rflags)
    return [] if found == right else [f"trap {number}: {found}, must be {right}"]


def with_out(program: Program) -> Program:
    """The program with an OUT in the place of each trap."""

    def plain(step: Plain) -> Plain:
        code = step.code
        for trap, out in _INSTEAD:
            code = code.replace(trap, out)
        return Plain(step.text, code)

    def changed(step: Step) -> Step:
        if isinstance(step, Plain):
            return plain(step)
        if isinstance(step, Branch):
            return Branch(step.condition, tuple(map(plain, step.body)))
        if isinstance(step, Patchable):
            first, second = step.forms
            return Patchable((plain(first), plain(second)))
        return step

    return replace(
        program,
        main=tuple(map(changed, program.main)),
        subs=tuple(tuple(map(changed, sub)) for sub in program.subs),
    )
