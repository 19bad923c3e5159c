"""Instructions that do nothing, in the place of a trap instruction: as long as it, and reversible.

A vCPU that executes one ends the instruction as the processor would: a single step that the guest
has asked for (TF), the shadow of STI and MOV SS, RF. Intel SDM volume 2, NOP.

| trap | does nothing |
|---|---|
| VMCALL, `0F 01 C1` | `0F 1F C1` |
| VMMCALL, `0F 01 D9` | `0F 1F D9` |
| CPUID, `0F A2` | `66 90` |

Compilers use `0F 1F` with a memory operand only, so the first two are recognised where they are
found.
"""

from typing import NamedTuple

from vmibridge.arch.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.event import TrapReason

_PATCHES = {
    TrapReason.CPUID: (2, b"\x0f\xa2", b"\x66\x90"),
    TrapReason.VMCALL: (2, b"\x01", b"\x1f"),
    TrapReason.VMMCALL: (2, b"\x01", b"\x1f"),
}
"""From how many bytes before its end on, what stands there, and what takes its place."""


class Patch(NamedTuple):
    """A change of code: where in it, and the bytes before and after."""

    offset: int
    trap: bytes
    skip: bytes


def patch_of(reason: TrapReason, length: int) -> Patch:
    """What makes a trap instruction of `length` bytes one that does nothing."""
    before_end, trap, skip = _PATCHES[reason]
    return Patch(length - before_end, trap, skip)


def unpatched(code: bytes, width: int) -> bytes | None:
    """The code as it was, if it begins with a VMCALL or VMMCALL that was patched; else `None`."""
    for at in range(min(len(code), MAX_INSTRUCTION) - 2):
        if code[at : at + 2] == b"\x0f\x1f" and code[at + 2] in (0xC1, 0xD9):
            before = code[: at + 1] + b"\x01" + code[at + 2 :]
            found = decode_trap(before, width)
            return before if found and found[1] == at + 3 else None
    return None
