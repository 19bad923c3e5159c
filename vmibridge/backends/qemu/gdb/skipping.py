"""Instructions that do nothing, in the place of a trap instruction and as long as it.

A vCPU that executes one ends the instruction as the processor would: a single step that the guest
has asked for (TF), the shadow of STI and MOV SS, RF. Intel SDM volume 2, NOP.

For one step the whole instruction is replaced (`nop`): behind the prefixes of the trap, a NOP
may be another instruction, as `F3 90` is PAUSE. What stays behind for others is reversible:

| trap | does nothing |
|---|---|
| VMCALL, `0F 01 C1` | `0F 1F C1` |
| VMMCALL, `0F 01 D9` | `0F 1F D9` |

Compilers use `0F 1F` with a memory operand only, so these are recognised where they are found.
"""

from typing import NamedTuple

from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.vm.trap import TrapReason

_BEFORE_END, _TRAP, _SKIP = 2, b"\x01", b"\x1f"


class Patch(NamedTuple):
    """A change of code: where in it, and the bytes before and after."""

    offset: int
    trap: bytes
    skip: bytes


def nop(length: int) -> bytes:
    """One instruction of `length` bytes that does nothing, in code of any width."""
    return b"\x66" * (length - 1) + b"\x90"


def patch_of(reason: TrapReason, length: int) -> Patch | None:
    """What makes a trap instruction of `length` bytes one that does nothing; no CPUID is."""
    if reason is TrapReason.CPUID:
        return None
    return Patch(length - _BEFORE_END, _TRAP, _SKIP)


def unpatched(code: bytes, width: int) -> bytes | None:
    """The code as it was, if it begins with a VMCALL or VMMCALL that was patched; else `None`."""
    for at in range(min(len(code), MAX_INSTRUCTION) - 2):
        if code[at : at + 2] == b"\x0f\x1f" and code[at + 2] in (0xC1, 0xD9):
            before = code[: at + 1] + b"\x01" + code[at + 2 :]
            found = decode_trap(before, width)
            return before if found and found[1] == at + 3 else None
    return None
