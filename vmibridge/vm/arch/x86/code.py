"""The code segment that a vCPU runs in: how wide its code is, and where it is in linear memory.

Backends learn it by different means. What they learn means the same:

| a backend knows | it asks |
|---|---|
| the mode and the selector | `segment_of_mode`, which has the answer for 16-bit modes only |
| the descriptor in memory | `segment_of_descriptor` |
| the base and flags that the processor has loaded | `segment_of_cache` |

Two of them may differ: a guest may change a descriptor, or leave real mode, and go on in the
segment that was loaded before. Intel SDM volume 3, sections 3.4.3 (segment registers and their
hidden part), 3.4.4 (in IA-32e mode) and 3.4.5 (descriptors).
"""

from typing import NamedTuple

from vmibridge.vm.arch.x86.segment import base_of, is_segmented_16, width_of

_MASK32, _MASK64 = 0xFFFF_FFFF, (1 << 64) - 1


class CodeSegment(NamedTuple):
    """Where code runs."""

    base: int
    """Linear; 0 for 64-bit code, whatever its descriptor says."""
    width: int
    """Of addresses, in bits: 16, 32 or 64."""

    def linear(self, ip: int) -> int:
        """The linear address of an offset in it; below 64 bits it wraps at 4 GiB."""
        return ip & _MASK64 if self.width == 64 else self.base + ip & _MASK32


CODE_64 = CodeSegment(0, 64)
"""That of all 64-bit code."""


def segment_of_mode(cs: int, cr0: int, rflags: int) -> CodeSegment | None:
    """The segment in real and virtual-8086 mode; `None` in others, where it has a descriptor."""
    return CodeSegment(cs << 4, 16) if is_segmented_16(cr0, rflags) else None


def segment_of_descriptor(descriptor: int, efer: int) -> CodeSegment:
    """The segment of an 8-byte code descriptor."""
    width = width_of(descriptor, efer)
    return CODE_64 if width == 64 else CodeSegment(base_of(descriptor), width)


def segment_of_cache(base: int, flags: int, efer: int) -> CodeSegment:
    """The segment that the processor has loaded; `flags` is the upper half of its descriptor."""
    width = width_of(flags << 32, efer)
    return CODE_64 if width == 64 else CodeSegment(base, width)
