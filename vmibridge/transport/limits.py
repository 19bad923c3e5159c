"""What one agent may have a server keep: a setting of the server, which no frame carries.

It stands below everything else of the transport: each part that holds something for a peer
takes its bound from here. What a single frame may hold is in `wire`, since both ends keep it.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from vmibridge.bridge.bounds import Count, Seconds, check_fields


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
        Meta(description="peers that may be at that at a time; beyond it the oldest is hung up on"),
    ] = 128
    sessions: Annotated[Count, Meta(description="VMs, those included whose agent is away")] = 256
    keep: Annotated[
        Seconds, Meta(description="how long a VM is remembered whose agent is away")
    ] = 300.0
    silence: Annotated[
        Seconds,
        Meta(description="without a byte from an agent, until the connection counts as lost"),
    ] = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
