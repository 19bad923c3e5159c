"""Guest memory that several servers ask one agent for.

Each server numbers its accesses from 1. To the agent they have other numbers, with the number
of the server in them; and no more are under way than one server may have, others wait.
"""

from collections import deque

from msgspec.structs import replace

from vmibridge.errors import WireError
from vmibridge.transport.nats.peers import Peer
from vmibridge.transport.wire import MAX_ACCESSES, MAX_LARGE_ACCESSES, Memory, Read, Write

_MAX_UNDER_WAY = MAX_ACCESSES + MAX_LARGE_ACCESSES
_BITS = 64


class PeerAccesses:
    """See the module."""

    def __init__(self) -> None:
        self._under_way: dict[int, Peer] = {}
        self._held: deque[Read | Write] = deque()

    def take(self, frame: Read | Write, peer: Peer) -> Read | Write | None:
        """The access as the agent is to see it; `None`: not now, or it is under way already.

        Raises `WireError` for a server that has more under way than it may.
        """
        number = peer.number << _BITS | frame.access
        if number in self._under_way:
            return None
        # Twice: it forgets those of handlers that were cancelled.
        if peer.under_way >= 2 * _MAX_UNDER_WAY:
            raise WireError("more accesses to memory at a time than were agreed")
        peer.under_way += 1
        self._under_way[number] = peer
        found = replace(frame, access=number)
        if len(self._under_way) - len(self._held) > _MAX_UNDER_WAY:
            self._held.append(found)
            return None
        return found

    def reply(self, frame: Memory) -> tuple[Peer, Memory] | None:
        """Whom a reply is for, and as that server is to see it."""
        peer = self._under_way.pop(frame.access, None)
        if peer is None:
            return None
        peer.under_way -= 1
        return peer, replace(frame, access=frame.access & (1 << _BITS) - 1)

    def following(self) -> Read | Write | None:
        """One that waited, after a reply."""
        return self._held.popleft() if self._held else None
