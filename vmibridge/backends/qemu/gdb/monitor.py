"""What QEMU's monitor tells that its gdbstub does not: memory regions, descriptor tables.

QEMU documents neither text as an interface; those of 7.2 and 11.1 are alike. What is not
found in a text is left out.
"""

import re
from typing import NamedTuple

ALL_REGISTERS = "info registers -a"
FLAT_VIEW = "info mtree -f"
ACCELERATOR = "info kvm"
STATUS = "info status"

_REGION = re.compile(
    r"^ +([0-9a-f]{1,16})-([0-9a-f]{1,16}) \(prio -?\d+, ([a-z-]+)\)", re.MULTILINE
)
_CODE = re.compile(r"^CS =[0-9a-f]{4} ([0-9a-f]{8,16}) [0-9a-f]{8} ([0-9a-f]{8})", re.MULTILINE)
_TABLE = re.compile(r"^(?:GDT= +|LDT=[0-9a-f]{4} )([0-9a-f]{8,16}) ([0-9a-f]{8})", re.MULTILINE)


class Region(NamedTuple):
    """A range of physical memory."""

    start: int
    end: int
    """Behind its last byte."""
    writable: bool


class Tables(NamedTuple):
    """The code segment of a vCPU as its processor has loaded it, and where descriptors are."""

    gdt: int
    ldt: int
    """Linear addresses."""
    base: int = 0
    """The linear address of the code segment."""
    flags: int | None = None
    """The upper half of its descriptor. `None`: the monitor does not show it."""


def parse_regions(text: str) -> list[Region]:
    """The RAM and ROM that `info mtree -f` shows in the address space of the memory, in order."""
    found: list[Region] = []
    for view in re.split(r"^FlatView ", text, flags=re.MULTILINE):
        if 'AS "memory"' not in view:
            continue
        for match in _REGION.finditer(view):
            start, last, kind = int(match[1], 16), int(match[2], 16), match[3]
            if kind not in ("ram", "rom"):
                continue
            region = Region(start, last + 1, kind == "ram")
            before = found[-1] if found else None
            if before and before.end == start and before.writable == region.writable:
                found[-1] = before._replace(end=region.end)
            else:
                found.append(region)
    return found


def within(regions: list[Region], address: int, size: int, *, write: bool) -> bool:
    """Whether all of a range is memory that can be read, or written."""
    end = address + size
    for region in regions:
        if region.start <= address < region.end and (region.writable or not write):
            if end <= region.end:
                return True
            address = region.end
    return False


def parse_tables(text: str, vcpu: int) -> Tables | None:
    """From `info registers -a`, or of a QEMU that does not number its only vCPU."""
    parts = re.split(r"^CPU#(\d+)\s*$", text, flags=re.MULTILINE)
    numbered = dict(zip(parts[1::2], parts[2::2], strict=True))
    own = numbered.get(str(vcpu), parts[0])
    found = {match[0][:3]: int(match[1], 16) for match in _TABLE.finditer(own)}
    if "GDT" not in found:
        return None
    code = _CODE.search(own)
    segment = (int(code[1], 16), int(code[2], 16)) if code else (0, None)
    return Tables(found["GDT"], found.get("LDT", 0), *segment)
