"""What is generated for each kind of backend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """What is generated for one kind of backend."""

    faults: float = 0.25
    """The share of programs that have instructions that fault."""
    ends_at_fault: bool = False
    widths: tuple[int, ...] = (64, 64, 32, 32, 16)
    reasons: tuple[str, ...] = ("cpuid", "cpuid", "vmcall", "vmmcall")
    handler_patches: bool = True
    """Whether handlers write code."""
    single_step: bool = True
    breakpoints: bool = True
    interrupts: bool = True
    always_if: bool = False
    locked_cpuid: bool = True
    """Older translators run a CPUID with LOCK."""
    hidden_segments: bool = True
    """Whether the descriptor of CS changes in memory while the processor keeps what it loaded."""
    af_of_shifts: int = 0
    """As in `Start`. QEMU's translator, Unicorn's and processors by Intel have 0."""
    odd_bases: bool = True
    """Whether CS has a base that 64-bit code must do without, or that makes addresses wrap; a
    translator itself may not know these."""


EVERYTHING = Profile()
BY_BREAKPOINTS = Profile(breakpoints=False)
BY_BREAKPOINTS_OF_7_2 = Profile(breakpoints=False, locked_cpuid=False, odd_bases=False)
"""QEMU takes a breakpoint of gdb and one of the guest's at one address for the guest's."""
BY_KVM = Profile(
    single_step=False, breakpoints=False, interrupts=False, odd_bases=False, always_if=True
)
"""KVM that emulates ring 0 shows IF as set, checks alignment, and does not know IOPL."""
NO_EXCEPTIONS = Profile(
    faults=0.15,
    ends_at_fault=True,
    breakpoints=False,
    interrupts=False,
    odd_bases=False,
    hidden_segments=False,
)
BY_PLUGIN_API_ALONE = Profile(
    widths=(64,), reasons=("cpuid",), handler_patches=False, odd_bases=False
)
"""What is exact without QEMU's own functions: CPUID in 64-bit code, which no handler writes."""
