"""The description of x86: 16, 32 and 64 bits, Intel's and AMD's."""

from typing import Final

from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.forms import FORMS, is_guest_request
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION
from vmibridge.vm.arch.x86.paging import pages, walk
from vmibridge.vm.arch.x86.registers import ROOTS, Registers, page_root

X86: Final = Architecture(
    name="x86",
    version=1,
    registers=Registers,
    instruction_pointer="rip",
    flags="rflags",
    values=(
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
        *(f"r{number}" for number in range(8, 16)),
    ),
    rings=4,
    widths=frozenset({16, 32, 64}),
    narrowest=32,
    longest_instruction=MAX_INSTRUCTION,
    roots=ROOTS,
    page_root=page_root,
    walk=walk,
    pages=pages,
    forms=FORMS,
    is_guest_request=is_guest_request,
)
