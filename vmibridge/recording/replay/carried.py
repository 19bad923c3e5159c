"""Numbers of traps that an agent carries.

A session takes a trap whose number has not risen for one that comes again, and does not answer it.
The numbers of a recording rise, but a retry that it does not have gets a number beyond all of them
(`request.further_retry`): what follows has to be beyond that.
"""

import msgspec

from vmibridge.vm.trap import TrapEvent

__all__ = ["CarriedTraps"]


class CarriedTraps:
    """Traps under way, as they are in the walk and as they are carried."""

    def __init__(self) -> None:
        self._last = 0
        self._played: dict[int, TrapEvent] = {}
        self._carried: dict[int, TrapEvent] = {}

    def carry(self, event: TrapEvent, *, made_up: bool) -> TrapEvent:
        """The trap with a number that rises: its own where that does, and it was not `made_up`."""
        number = self._last + 1 if made_up else max(self._last + 1, event.seq)
        self._last = number
        self._played[number] = event
        carried = self._carried[event.seq] = msgspec.structs.replace(event, seq=number)
        return carried

    def carried(self, event: TrapEvent) -> TrapEvent:
        """The trap as it is carried."""
        return self._carried.get(event.seq, event)

    def played(self, carried: TrapEvent) -> TrapEvent:
        """The trap as it is in the walk."""
        return self._played.get(carried.seq, carried)

    def end(self, carried: TrapEvent) -> TrapEvent:
        """The same, of one that is answered or was never taken."""
        event = self._played.pop(carried.seq, carried)
        self._carried.pop(event.seq, None)
        return event
