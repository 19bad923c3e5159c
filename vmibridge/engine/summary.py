"""What became of the traps of a run, counted."""

from collections.abc import Iterable
from typing import Self

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.vm.backend import GuestEnd

__all__ = ["Summary"]


class Summary(msgspec.Struct):
    """Counts of one run, and how the guest ended."""

    outcomes: dict[OutcomeKind, int] = msgspec.field(
        default_factory=lambda: dict.fromkeys(OutcomeKind, 0)
    )
    """Each trap that was answered, once."""
    native: int = 0
    """Traps that were not ours and ran natively."""
    retries: int = 0
    """Traps that asked again for what was told to wait; counted among the outcomes, too."""
    uncollected: int = 0
    """Results that no retry came for, before they expired or the run ended."""
    abandoned: int = 0
    """Handlers that were cancelled at the end of the run, with no trap waiting for them."""
    blocked: int = 0
    """How often a handler held up the event loop for `blocked_after` seconds or longer."""
    unrecorded: int = 0
    """Traps that were to be recorded and are not, such as for a disk that was full. Known when the
    VM has ended."""
    guest: GuestEnd | None = None
    """`None` until the guest has ended."""

    @property
    def total(self) -> int:
        """How many traps were answered."""
        return sum(self.outcomes.values())

    @classmethod
    def of_all(cls, summaries: Iterable["Summary"]) -> Self:
        """The sum of several VMs; it has an end when each has."""
        whole = cls()
        ends: list[GuestEnd | None] = []
        for each in summaries:
            for kind, count in each.outcomes.items():
                whole.outcomes[kind] += count
            whole.native += each.native
            whole.retries += each.retries
            whole.uncollected += each.uncollected
            whole.abandoned += each.abandoned
            whole.blocked += each.blocked
            whole.unrecorded += each.unrecorded
            ends.append(each.guest)
        known = [end for end in ends if end is not None]
        if ends and len(known) == len(ends):
            whole.guest = GuestEnd(tuple(vcpu for end in known for vcpu in end.vcpus))
        return whole
