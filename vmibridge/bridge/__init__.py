"""The protocol of vmi-utils, and what an author of handlers touches.

| module | holds |
|---|---|
| `packet`, `response`, `status` | what a guest asks, what it gets, and how a status is encoded |
| `contract` | what a handler answers to: magic, stamps, what is read of the guest |
| `handler`, `context` | `BridgeHandler` and `method`; what a handler sees of the guest |
| `parameters`, `signatures`, `typed_method` | methods that take values in place of a packet |
| `dispatch`, `outcome` | from a packet to its handler; what became of a trap |
| `registers` | the forms in which registers carry packets and responses |
| `numbers`, `output` | what handlers give, made fit for registers, files and frames |
| `guest_exit` | the output by which a guest says that it is done |
"""

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import (
    STANDARD_FALLBACK,
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    STANDARD_WAIT,
    BridgeContract,
    GuestRead,
)
from vmibridge.bridge.dispatch import Bridge, BridgeDispatch
from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.handler import BridgeHandler, method
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.parameters import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    GuestBytes,
    GuestInt,
    GuestRoom,
    GuestText,
    HostOutput,
    Room,
)
from vmibridge.bridge.response import BridgeResponse
from vmibridge.bridge.standard import StandardHandler
from vmibridge.bridge.status import Gate, Status, StatusKind

__all__ = [
    "I8",
    "I16",
    "I32",
    "I64",
    "STANDARD_FALLBACK",
    "STANDARD_MAGIC",
    "STANDARD_VERIFY_VALUE3",
    "STANDARD_VERIFY_VALUE4",
    "STANDARD_WAIT",
    "U8",
    "U16",
    "U32",
    "U64",
    "Bridge",
    "BridgeContext",
    "BridgeContract",
    "BridgeDispatch",
    "BridgeHandler",
    "BridgePacket",
    "BridgeResponse",
    "Gate",
    "GuestBytes",
    "GuestExit",
    "GuestInt",
    "GuestRead",
    "GuestRoom",
    "GuestText",
    "HostOutput",
    "Outcome",
    "OutcomeKind",
    "Room",
    "StandardHandler",
    "Status",
    "StatusKind",
    "method",
]
