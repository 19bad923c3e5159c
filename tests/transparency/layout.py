"""Where everything is in the memory of the guest that runs generated programs.

Physical memory below 4 MiB, identity-mapped by 2 MiB pages that ring 3 may use, too. Beside that,
16 pages at `WINDOW` are mapped one by one to the pages of code, by one table for each of the two
address spaces.
"""

import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

IMAGE = 0x10_0000
LOADER_END = 0x10_4000
IDT = 0x10_5000
TASK = 0x10_6000
ROOT_A, ROOT_B = 0x10_8000, 0x10_C000
"""A root is followed by its directory pointers and its directory of the window."""
LOW, HIGH = 0x10_B000, 0x10_F000
"""Directories that both share: the first GiB, and the one of the local APIC."""
TABLE_A, TABLE_B = 0x11_0000, 0x11_1000

STATE = 0x11_2000
"""One page that is written for each program: what follows, up to `STATE_END`."""
GDT, LDT = STATE, STATE + 0x200
CONTEXT, FIXUPS = STATE + 0x400, STATE + 0x500
DATA, DATA_SIZE = STATE + 0x800, 0x100
STACK, STACK_SIZE = STATE + 0xA00, 0x600
STATE_END = STATE + 0x1000

RESULT, LOG = 0x11_3000, 0x11_3200
RESULT_SIZE = 0x1000
MAX_LOG = 110
MAX_FIXUPS = 64

EXCEPTION_STACK, END_STACK, STACK_OF_LOADER = 0x11_6000, 0x11_7000, 0x11_8000
CODE = 0x12_0000
CODE_PAGES = 8
MEMORY_END = CODE + CODE_PAGES * 0x1000

PAGE = 0x1000
WINDOW = 0x4000_0000
WINDOW_PAGES = 16
APIC = 0xFEE0_0000

MAGIC = 0x4249_4D56
FOREIGN_LEAF = 0x4000_0001
"""A leaf of CPUID that is all zeros in Unicorn and in QEMU's own translator."""
LOADER_MAGIC = 0x4C4F_4144
LOADER_PORT, TRAP_PORT = 0x11, 0x10
END_VECTOR, INTERRUPT = 0x40, 0x50

FIRST_CODE_SELECTOR, LAST_CODE_SELECTOR = 3, 57
TASK_SELECTOR, LOCAL_SELECTOR = 58 * 8, 60 * 8
_PRESENT_CODE, _PRESENT_DATA = 0x9B, 0x93


def descriptor(*, base: int, width: int, ring: int, code: bool = True) -> int:
    """Of a segment of 4 GiB. Data segments are 32-bit ones."""
    access = (_PRESENT_CODE if code else _PRESENT_DATA) | ring << 5
    flags = {64: 0xA, 32: 0xC, 16: 0x8}[width if code else 32]
    return (
        0xFFFF
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | 0xF << 48
        | flags << 52
        | (base >> 24) << 56
    )


def system_descriptor(kind: int, base: int, limit: int) -> tuple[int, int]:
    return limit | (base & 0xFF_FFFF) << 16 | (0x80 | kind) << 40 | (base >> 24) << 56, 0


def fixed_gdt() -> list[int]:
    """The entries that the loader needs; the others are empty."""
    entries = [0] * 64
    entries[1] = descriptor(base=0, width=64, ring=0)
    entries[2] = descriptor(base=0, width=32, ring=0, code=False)
    entries[58:60] = system_descriptor(9, TASK, 0x6F)
    entries[60:62] = system_descriptor(2, LDT, 0x1FF)
    return entries


@cache
def loader(*, kvm: bool = False) -> tuple[bytes, int]:
    """The memory from `IMAGE` on, and the address behind the loader's own VMCALL."""
    names = (
        "IMAGE", "ROOT_A", "GDT", "IDT", "STACK_OF_LOADER", "TASK_SELECTOR", "APIC", "LOADER_PORT",
        "CONTEXT", "LOCAL_SELECTOR", "RESULT", "MAX_LOG", "LOG", "INTERRUPT", "FIXUPS",
        "END_VECTOR", "LOADER_MAGIC",
    )  # fmt: skip
    options = [f"-D{name}={globals()[name]:#x}" for name in names] + ["-DKVM"] * kvm
    source = Path(__file__).with_name("loader.asm")
    with tempfile.NamedTemporaryFile() as image:
        command = ["nasm", "-Werror", "-f", "bin", "-o", image.name, *options, str(source)]
        subprocess.run(command, check=True)
        code = Path(image.name).read_bytes()
    assert len(code) <= LOADER_END - IMAGE
    memory = bytearray(LDT - IMAGE)
    memory[: len(code)] = code

    def put(address: int, data: bytes) -> None:
        memory[address - IMAGE : address - IMAGE + len(data)] = data

    stubs = IMAGE + len(code) - 5 - 33 * 16
    for vector in [*range(32), INTERRUPT, END_VECTOR]:
        stub = stubs + 16 * {INTERRUPT: 32, END_VECTOR: 33}.get(vector, vector)
        stack = 2 if vector == END_VECTOR else 1
        put(IDT + 16 * vector, _gate(stub, stack))
    put(
        TASK,
        struct.pack("<I3Q8x7Q", 0, *[EXCEPTION_STACK] * 3, EXCEPTION_STACK, END_STACK, *[0] * 5),
    )
    put(TASK + 0x66, b"\x68\0" + bytes(4) + b"\xff" * 4)  # ring 3 may use ports 0 to 31
    for root, table in ((ROOT_A, TABLE_A), (ROOT_B, TABLE_B)):
        put(root, struct.pack("<Q", root + 0x1007))
        put(root + 0x1000, struct.pack("<4Q", LOW | 7, root + 0x2007, 0, HIGH | 7))
        put(root + 0x2000, struct.pack("<Q", table | 7))
    put(GDT, struct.pack("<64Q", *fixed_gdt()))
    put(LOW, struct.pack("<512Q", *(at << 21 | 0x87 for at in range(512))))
    put(HIGH + 8 * (APIC >> 21 & 511), struct.pack("<Q", APIC | 0x9F))  # not cached
    site = code.index(struct.pack("<BI", 0xB9, LOADER_MAGIC)) + 5
    return bytes(memory), IMAGE + site + (2 if kvm else 3)


def _gate(address: int, stack: int) -> bytes:
    return struct.pack("<HHBBHII", address & 0xFFFF, 8, stack, 0xEE, address >> 16, 0, 0)
