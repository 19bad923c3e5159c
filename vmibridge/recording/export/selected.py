"""What an export of a part of a recording lacks, as notes that an import of it has."""

from collections.abc import Iterator

from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.other_vms import other_vms_text
from vmibridge.recording.traps import RecordedTrap

__all__ = ["MISSING", "LeftOut"]

MISSING = (
    "traps of this VM are missing, which were not selected for an export, and what handlers kept"
    " of them"
)
_MAX_PLACES = 4096


class LeftOut:
    """Traps that are not selected, in one pass over a recording."""

    def __init__(self) -> None:
        self._vms: dict[str, None] = {}
        """Those that are exported."""
        self._gaps: dict[str, tuple[int, int]] = {}
        """Of each VM the place of the first trap that is left out, and its time."""
        self._places: list[tuple[int, int]] = []
        """Further ones: a note needs a place that no other message has."""

    def hear(self, timed: TimedMessage) -> None:
        """A message is exported that belongs to no trap."""
        if isinstance(timed.message, Session):
            self._vms[timed.message.vm] = None

    def add(self, trap: RecordedTrap) -> None:
        """A trap is left out."""
        at = trap.place, trap.time
        if trap.event.vm not in self._gaps:
            self._gaps[trap.event.vm] = at
        elif len(self._places) < _MAX_PLACES:
            self._places.append(at)

    def notes(self) -> Iterator[tuple[int, TimedMessage]]:
        """The notes, with their places."""
        others = sorted(self._gaps.keys() - self._vms)
        free = [self._gaps[vm] for vm in others] + self._places
        for vm in self._vms:
            if vm in self._gaps:
                place, time = self._gaps[vm]
                yield place, TimedMessage(time, Note("lost", MISSING, vm))
            if others and free:
                place, time = free.pop(0)
                yield place, TimedMessage(time, Note("lost", other_vms_text(others), vm))
