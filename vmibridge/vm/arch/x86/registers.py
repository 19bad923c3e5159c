"""The registers of an x86 vCPU, and the bits of them that say how it runs.

Registers are named as in the vendors' manuals; values are unsigned, and those of a 32-bit guest are
zero-extended. Bits: Intel SDM volume 3A, sections 2.2.1 (EFER) and 2.5 (control registers).
"""

import msgspec

__all__ = [
    "CR0_PE",
    "CR0_PG",
    "CR0_WP",
    "CR4_LA57",
    "CR4_PAE",
    "CR4_PSE",
    "EFER_LMA",
    "RFLAGS_VM",
    "ROOTS",
    "Registers",
    "page_root",
]

CR0_PE = 1 << 0
"""Protected mode."""
CR0_WP = 1 << 16
"""Rings 0 to 2 need writable pages, too."""
CR0_PG = 1 << 31
"""Paging is on."""
CR4_PSE = 1 << 4
"""Pages of 4 MiB in 32-bit paging."""
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
"""Five levels of page tables."""
EFER_LMA = 1 << 10
"""Long mode is active."""
RFLAGS_VM = 1 << 17
"""Virtual-8086 mode."""
_ROOT = 0x000F_FFFF_FFFF_F000
_ROOT_PAE = 0xFFFF_FFE0
_ROOT_32BIT = 0xFFFF_F000
ROOTS = _ROOT | _ROOT_PAE
"""The bits that `page_root` may have."""


class Registers(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The registers of one vCPU at a trap, 64 bits each.

    CR0, CR3, CR4 and EFER say how the guest's virtual addresses are mapped.
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rbp: int = 0
    rsp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 0x2
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


def page_root(registers: Registers) -> int:
    """The physical address of the root of the page tables.

    It is CR3 without the bits that do not name the root: a guest changes those from one
    switch of tasks to the next (PCID), or per task (LAM). Intel SDM volume 3A, tables
    4-3 (32-bit paging), 4-7 (PAE) and 4-12 and 4-13 (4 and 5 levels):

    | paging | bits of the root |
    |---|---|
    | 4 or 5 levels, or none | 12 to 51 |
    | PAE | 5 to 31 |
    | 32-bit | 12 to 31 |

    A kernel that isolates its page tables (Linux with PTI) has two roots for one
    process: one that ring 3 runs on, and one for ring 0.
    """
    if registers.efer & EFER_LMA or not registers.cr0 & CR0_PG:
        return registers.cr3 & _ROOT
    return registers.cr3 & (_ROOT_PAE if registers.cr4 & CR4_PAE else _ROOT_32BIT)
