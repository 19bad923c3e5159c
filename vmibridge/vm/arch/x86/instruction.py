"""Trap instructions in machine code: which one, and how long with its prefixes.

Intel SDM volume 2, sections 2.1.1 (prefixes, at most 15 bytes in all) and 2.2.1 (REX).
LOCK makes each of them undefined, so a locked one is none of ours.
"""

from vmibridge.vm.reason import TrapReason

MAX_INSTRUCTION = 15
"""Bytes; a longer instruction raises #GP."""

_LEGACY_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3")
_OPCODES = {
    b"\x0f\xa2": TrapReason.CPUID,
    b"\x0f\x01\xc1": TrapReason.VMCALL,
    b"\x0f\x01\xd9": TrapReason.VMMCALL,
}


def decode_trap(code: bytes, width: int) -> tuple[TrapReason, int] | None:
    """The trap instruction at the start of `code`, and its length in bytes.

    `width` is the address width in bits: only at 64 are 0x40 to 0x4F a prefix.
    `None` for any other instruction, or one that `code` holds only a part of.
    """
    at = 0
    while at < len(code) and code[at] in _LEGACY_PREFIXES:
        at += 1
    while (
        width == 64 and at < len(code) and (code[at] & 0xF0 == 0x40 or code[at] in _LEGACY_PREFIXES)
    ):
        at += 1
    for size in (2, 3):
        reason = _OPCODES.get(code[at : at + size])
        if reason is not None and at + size <= MAX_INSTRUCTION:
            return reason, at + size
    return None


def is_locked(code: bytes, width: int) -> bool:
    """Whether the start of `code` is a trap instruction with LOCK, which raises #UD."""
    if decode_trap(code, width) is not None:
        return False
    prefixes, opcode, rest = code.partition(b"\x0f")
    unlocked = prefixes.replace(b"\xf0", b"")
    return unlocked != prefixes and decode_trap(unlocked + opcode + rest, width) is not None
