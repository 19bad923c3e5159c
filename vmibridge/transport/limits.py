"""What one agent may have a server keep: a setting of the server, which no frame carries.

It stands below everything else of the transport: each part that holds something for a peer
takes its bound from here. What a single frame may hold is in `wire`, since both ends keep it.
"""

import msgspec


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
