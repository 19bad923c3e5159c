"""What became of one trap.

| kind | the handler | the guest gets |
|---|---|---|
| handled | returned a response | the response, stamped |
| rejected | matched, returned nothing | the fallback |
| unmatched | none for this request | its registers as they were |
| waiting | ran past its soft deadline, goes on | WAIT, stamped |
| timeout | ran past its hard deadline, was cancelled | the fallback |
| failed | raised, or the guest is 16-bit code | the fallback |
| denied | was not asked: policy | what the policy says; by default the instruction runs natively |
| cancelled | was cancelled, the server stopped, or the vCPU is gone | the fallback |

The default fallback leaves the registers alone. In every case the guest moves on. A
request that was told to wait has an outcome for each of its traps: *waiting*, until a
retry gets the result.
"""

import re
from enum import Enum
from typing import TYPE_CHECKING, Generic

import msgspec

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse, T
from vmibridge.vm.trap import RegisterWrites, TrapEvent

__all__ = ["Outcome", "OutcomeKind"]

STOPPED = "the server stopped"
"""The error of a trap that was cancelled by the end of the server."""
GONE = "the VM is gone"
"""The error of a trap whose vCPU ended or was lost while it waited."""
_TOO_LATE = re.compile(r"no answer within ([0-9.e+-]{1,24}) s")


def too_late(timeout: float) -> str:
    """The error of a trap whose hard deadline passed after so many seconds."""
    return f"no answer within {timeout:g} s"


def timeout_in(error: str | None) -> float | None:
    """The seconds that such an error tells; `None`: it is another one."""
    found = None if error is None else _TOO_LATE.fullmatch(error)
    try:
        return None if found is None else float(found[1])
    except ValueError:
        return None


class OutcomeKind(Enum):
    """How a trap ended; see the table of this module."""

    HANDLED = "handled"
    REJECTED = "rejected"
    UNMATCHED = "unmatched"
    WAITING = "waiting"
    TIMEOUT = "timeout"
    FAILED = "failed"
    DENIED = "denied"
    CANCELLED = "cancelled"

    # Members are singletons, and the hash of an Enum is a function in Python.
    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__


class Outcome(msgspec.Struct, Generic[T], frozen=True):
    """One trap from end to end."""

    kind: OutcomeKind
    packet: BridgePacket
    """What the guest asked."""
    response: BridgeResponse[T] | None = None
    """The answer as it was sent, stamps included; `None` where there was none."""
    handler: str | None = None
    """The name of the handler that matched."""
    error: str | None = None
    """Why it failed, in one line of printable text."""
    event: TrapEvent | None = None
    """The trap; `None` for a dispatch without one."""
    writes: RegisterWrites | None = None
    """What was written to the vCPU; `None` when nothing could be."""
    duration: float = 0.0
    """Seconds from taking the trap off its lane to the written answer."""
    retry_of: int | None = None
    """For a trap that asked again for what was told to wait: the sequence number of the
    trap that the request came with first."""

    @property
    def output(self) -> T | None:
        """The typed output of a handled request."""
        return None if self.response is None else self.response.output
