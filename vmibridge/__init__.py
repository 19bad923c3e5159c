"""vmibridge: async Python handlers for what a guest asks by one instruction.

The names of this module are the public interface; see `docs/`.
"""

from vmibridge.backend import open_backend
from vmibridge.context import BridgeContext
from vmibridge.contract import (
    STANDARD_FALLBACK,
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    STANDARD_WAIT,
    BridgeContract,
)
from vmibridge.dispatch import Bridge, BridgeDispatch
from vmibridge.errors import GuestMemoryError, VmiBridgeError
from vmibridge.event import Registers, RegisterWrites, TrapEvent, TrapReason
from vmibridge.handler import BridgeHandler, method
from vmibridge.outcome import Outcome, OutcomeKind
from vmibridge.packet import BridgePacket
from vmibridge.policy import AddressRange, Policy, Quota, Rate
from vmibridge.response import BridgeResponse
from vmibridge.server import BridgeServer
from vmibridge.status import Gate, Status, StatusKind

__version__ = "0.2.0"
"""That of the newest dated section of CHANGELOG.md."""

__all__ = [
    "STANDARD_FALLBACK",
    "STANDARD_MAGIC",
    "STANDARD_VERIFY_VALUE3",
    "STANDARD_VERIFY_VALUE4",
    "STANDARD_WAIT",
    "AddressRange",
    "Bridge",
    "BridgeContext",
    "BridgeContract",
    "BridgeDispatch",
    "BridgeHandler",
    "BridgePacket",
    "BridgeResponse",
    "BridgeServer",
    "Gate",
    "GuestMemoryError",
    "Outcome",
    "OutcomeKind",
    "Policy",
    "Quota",
    "Rate",
    "RegisterWrites",
    "Registers",
    "Status",
    "StatusKind",
    "TrapEvent",
    "TrapReason",
    "VmiBridgeError",
    "__version__",
    "method",
    "open_backend",
]
