"""Where a replay of a part of a recording ends: behind the last traps that are compared.

What is taken behind them may still matter: their handlers run on, and other requests change what
they find. So it is asked until they are answered; and where a handler serves several VMs, until
each VM that is compared is behind its last trap.
"""

from collections.abc import Callable, Iterable

from vmibridge.recording.replay.request import ReplayedRequest

__all__ = ["LastTraps"]

OpenRequests = Callable[[], Iterable[ReplayedRequest]]


class LastTraps:
    """Of all VMs of one file. `compared`: their recorded names; none: all are."""

    def __init__(self, compared: frozenset[str]) -> None:
        self.has_shared: bool = False
        """Whether a handler serves several VMs."""
        self._compared = compared
        self._open: dict[str, OpenRequests] = {}
        self._past: set[str] = set()
        self._unanswered: dict[str, list[ReplayedRequest]] = {}
        """Requests that were open when the last trap was past: of all VMs, or of each."""

    def add(self, vm: str, requests: OpenRequests) -> None:
        """One more VM; `requests` gives those of it that are open."""
        self._open[vm] = requests

    def are_answered(self, vm: str) -> bool:
        """A trap of a VM was taken behind them: whether it is of no interest any more."""
        self._past.add(vm)
        group, vms = vm, [vm]
        if self.has_shared:
            group, vms = "", [*self._open]
            if any(not self._compared or each in self._compared for each in {*vms} - self._past):
                return False
        if group not in self._unanswered:
            self._unanswered[group] = [each for name in vms for each in self._open[name]()]
        left = [each for each in self._unanswered[group] if not each.over]
        self._unanswered[group] = left
        return not left
