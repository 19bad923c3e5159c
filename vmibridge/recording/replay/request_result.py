"""What became of one request of a replay, for callers that look at each of them."""

from typing import Any

import msgspec

from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.packet import BridgePacket
from vmibridge.recording.messages import MemoryAccess, Reply
from vmibridge.recording.replay.compare import Difference
from vmibridge.vm.trap import TrapEvent

__all__ = ["NOT_SELECTED", "RequestResult"]

NOT_SELECTED = "it is not among those that are compared"


class RequestResult(msgspec.Struct, frozen=True):
    """One request of a recording, asked again."""

    vm: str
    """The name of its VM, as it is now."""
    vcpu: int
    seq: int
    """Of the trap that it came with."""
    time: int
    """When that was recorded, in nanoseconds since the Unix epoch."""
    event: TrapEvent
    """The trap that it came with."""
    packet: BridgePacket | None
    """`None` for a trap that has no register form."""
    handler: str | None
    """The name of the handler that took it then; else of the one that takes it now."""
    method: str
    """Its name, or else its code, as in 0x0001."""
    expected: Reply | None
    """What was recorded; `None`: the recording lacks its answer."""
    given: Outcome[Any] | None
    """What became of it now; `None`: it was not asked, or ran natively."""
    retries: tuple[int, ...] = ()
    """Numbers of the traps that asked for it again."""
    accesses: tuple[MemoryAccess, ...] = ()
    """The last ones that its handler made now."""
    difference: Difference | None = None
    """What counts of what differs; `None`: nothing, or it was accepted, or not compared."""
    unchecked: str | None = None
    """Why it was not compared; `None`: it was."""

    @property
    def output(self) -> Any:
        """The output of its handler, now."""
        return None if self.given is None else self.given.output
