"""The translated code of one Unicorn vCPU: where it is from, and what a host wrote there since.

Unicorn runs a guest's code in translated form, block by block. It sees what the guest writes into
its own code, and INVLPG and CR3, but not what the host writes. So the bytes that blocks were made
of are marked, by their physical address, and a block is dropped when a marked byte was written:

| the page of the code that was written | is dropped |
|---|---|
| is mapped where the vCPU ran it | at once: by that address, and for all others with it |
| is not: the guest has mapped something else there | all code, in `Freeze.thaw` |

Dropping a block does not end one that runs. A VMCALL ends its block anyway. A CPUID is in the
middle of its block, and Unicorn cannot leave that: the rest of it, which may be code that is no
more, runs to its end with memory that it cannot write, and is undone: `Freeze`.
"""

import ctypes
import mmap
import re
from collections.abc import Callable

from unicorn import UC_PROT_ALL, UC_PROT_EXEC, UC_PROT_READ, Uc, x86_const
from unicorn.unicorn_py3.unicorn import UcContext, uclib

_PAGE = 4096
_LOCKED_CPUID = re.compile(
    rb"\xf0[\x26\x2e\x36\x3e\x40-\x4f\x64-\x67\xf0\xf2\xf3]{0,12}\x0f\xa2", re.DOTALL
)
_MAX_ALIASES = 64
"""Virtual pages that one physical page of code is kept track of at: a guest may make any number."""


class UnicornPages:
    """Virtual to physical addresses, as the emulator itself has them. For the vCPU's thread."""

    def __init__(self, engine: Uc) -> None:
        self._handle = engine._uch  # noqa: SLF001 - the C functions take the C handle
        self._found = ctypes.c_uint64()
        self._place = ctypes.byref(self._found)
        self._kind = ctypes.c_uint32(UC_PROT_EXEC)

    def physical(self, address: int) -> int | None:
        """Where code at a linear address is fetched from; `None`: it cannot be."""
        status = uclib.uc_vmem_translate(
            self._handle, ctypes.c_uint64(address), self._kind, self._place
        )
        return None if status else self._found.value


class _CodePage:
    __slots__ = ("aliases", "marks")

    def __init__(self) -> None:
        self.aliases: set[int] = set()
        """The virtual pages that it ran at."""
        self.marks = 0
        """A bit for each byte that is translated."""


class TranslatedCode:
    """What one vCPU has translated. For its thread, but for `write`."""

    def __init__(self, engine: Uc, pages: UnicornPages, ram: mmap.mmap) -> None:
        self._engine = engine
        self._physical = pages.physical
        self._ram = ram
        self.may_lock: bool = False
        """Whether a CPUID with LOCK was among it, or what looks like one."""
        self._pages: dict[int, _CodePage] = {}
        self._written: dict[int, int] = {}

    def note(self, address: int, size: int) -> None:
        """A block of code at a linear address was translated."""
        code = b""
        while size > 0:
            part = min(size, _PAGE - address % _PAGE)
            physical = self._physical(address)
            if physical is not None:
                page = self._pages.setdefault(physical // _PAGE, _CodePage())
                page.marks |= _bits(physical % _PAGE, part)
                page.aliases.add(address // _PAGE)
                code += self._ram[physical : physical + part]
                if len(page.aliases) > _MAX_ALIASES:
                    # It is translated and noted again when it runs again.
                    self._drop(physical // _PAGE)
            address, size = address + part, size - part
        if not self.may_lock and _LOCKED_CPUID.search(code):
            self.may_lock = True

    def write(self, address: int, size: int) -> None:
        """The host has written to physical memory. On the loop, while the vCPU waits or runs."""
        written = self._written
        while size > 0:
            page, offset = divmod(address, _PAGE)
            part = min(size, _PAGE - offset)
            # The vCPU may take it out in between: then it is noted twice.
            written[page] = written.get(page, 0) | _bits(offset, part)
            address, size = address + part, size - part

    def drop_written(self, behind: Callable[[], int | None]) -> bool:
        """Drop what the host has written since the last time; whether the vCPU has to freeze.

        It has to where something could not be dropped, or where code was written behind the
        trap, whose block may go on there. `behind` is the linear address there, or `None` for a
        trap that ends its block.
        """
        freezes = False
        while self._written:
            # In one step: the loop may write meanwhile.
            number, bits = self._written.popitem()
            page = self._pages.get(number)
            if page is None or not page.marks & bits:
                continue
            freezes |= not self._drop(number) or self._is_behind(number, bits, behind())
        return freezes

    def forget(self) -> None:
        """All was flushed."""
        self._pages.clear()

    def _drop(self, number: int) -> bool:
        for virtual in self._pages.pop(number).aliases:
            physical = self._physical(virtual * _PAGE)
            if physical is not None and physical // _PAGE == number:
                # One address at which the page is still mapped is enough: its blocks go for all.
                self._engine.ctl_remove_cache(virtual * _PAGE, (virtual + 1) * _PAGE)
                return True
        return False

    def _is_behind(self, number: int, bits: int, address: int | None) -> bool:
        if address is None:
            return False
        physical = self._physical(address)
        if physical is not None and physical // _PAGE == number and bits >> physical % _PAGE:
            return True
        # The last instruction of a block may go on in the next page.
        following = self._physical((address | _PAGE - 1) + 1)
        return following is not None and following // _PAGE == number and bool(bits & 0x7FFF)


class Freeze:
    """The state of a vCPU in mid-block, kept while the rest of the block runs to no effect."""

    def __init__(self, engine: Uc, ram: mmap.mmap, rflags: int) -> None:
        """Inside a hook, when the registers are as they have to be. The run ends soon."""
        self._engine, self._size, self._rflags = engine, len(ram), rflags
        self._state: UcContext = engine.context_save()
        engine.mem_protect(0, self._size, UC_PROT_READ | UC_PROT_EXEC)
        engine.emu_stop()

    def thaw(self) -> None:
        """Between two runs."""
        self._engine.mem_protect(0, self._size, UC_PROT_ALL)
        self._engine.context_restore(self._state)
        # In mid-run a part of them is where only the translated code knows.
        self._engine.reg_write(x86_const.UC_X86_REG_EFLAGS, self._rflags)
        self._engine.ctl_flush_tb()


def _bits(offset: int, size: int) -> int:
    return (1 << size) - 1 << offset
