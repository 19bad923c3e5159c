"""What one agent may have a server keep: a setting of the server, which no frame carries.

It stands below everything else of the transport: each part that holds something for a peer
takes its bound from here. What a single frame may hold is in `wire`, since both ends keep it.
"""

from collections import OrderedDict
from typing import Annotated

import msgspec
from msgspec import Meta

from vmibridge.bridge.bounds import Count, Seconds, check_fields

WINDOW = 10.0
"""Seconds that `AgentLimits.new_sessions` is for."""
MAX_PEERS = 1024
"""Peers whose new sessions are counted; the one that was longest away is forgotten."""


class AgentLimits(msgspec.Struct, frozen=True):
    """What one agent may have a server keep. Raises `ValueError` for what is out of bounds."""

    vcpus: Annotated[
        int, Meta(ge=1, le=0xFFFF, description="vCPUs of one VM; each has one trap in flight")
    ] = 1024
    handshake: Annotated[
        Seconds, Meta(description="how long a peer has to say who it is, TLS included")
    ] = 5.0
    handshakes: Annotated[
        Count,
        Meta(
            description="peers that may be at that at a time; beyond it the connection of the"
            " oldest is closed"
        ),
    ] = 128
    sessions: Annotated[Count, Meta(description="VMs, those included whose agent is away")] = 256
    new_sessions: Annotated[
        Count,
        Meta(
            description="VMs that one peer may begin within 10 seconds: each loads handlers, and"
            " may open a recording; beyond it the peer is refused for now"
        ),
    ] = 64
    keep: Annotated[
        Seconds, Meta(description="how long a VM is remembered whose agent is away")
    ] = 300.0
    silence: Annotated[
        Seconds,
        Meta(description="without a byte from an agent, until the connection counts as lost"),
    ] = 30.0

    def __post_init__(self) -> None:
        check_fields(self)


class NewSessions:
    """Which peers may begin a session now: a token bucket a peer, over a clock that it is given."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._peers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer: str, now: float) -> bool:
        """Whether `peer` may begin one at `now`, in seconds; if so, it is counted."""
        tokens, since = self._peers.pop(peer, (float(self._limit), now))
        tokens = min(self._limit, tokens + (now - since) * self._limit / WINDOW)
        is_allowed = tokens >= 1
        self._peers[peer] = (tokens - is_allowed, now)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return is_allowed
