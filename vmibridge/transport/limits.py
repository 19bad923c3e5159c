"""What one agent may have a server keep: a setting of the server, which no frame carries.

It stands below everything else of the transport: each part that holds something for a peer
takes its bound from here. What a single frame may hold is in `wire`, since both ends keep it.
"""

from collections import OrderedDict

import msgspec

WINDOW = 10.0
"""Seconds that `AgentLimits.new_sessions` is for."""
MAX_PEERS = 1024
"""Peers whose new sessions are counted; the one that was longest away is forgotten."""


class AgentLimits(msgspec.Struct, frozen=True):
    """What one agent may have a server keep. Raises `ValueError` for what makes no sense."""

    vcpus: int = 1024
    """vCPUs of one VM; each has one trap in flight."""
    handshake: float = 5.0
    """Seconds that a peer has to say who it is, TLS included."""
    handshakes: int = 128
    """Peers that may be at that at a time; beyond it the oldest is hung up on."""
    sessions: int = 256
    """VMs, those included whose agent is away."""
    new_sessions: int = 64
    """VMs that one peer may begin within 10 seconds: each loads handlers, and may open a recording.
    Beyond it the peer is told to come later."""
    keep: float = 300.0
    """Seconds that a VM is remembered whose agent is away."""
    silence: float = 30.0
    """Seconds without a byte from an agent until the connection counts as lost."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a positive number, got {getattr(self, name)!r}")
        if self.vcpus > 0xFFFF:
            raise ValueError(f"vcpus is at most 65535, got {self.vcpus}")


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
