"""vmibridge: async Python handlers for what a guest asks by one instruction.

The names of this module are the public interface; see `docs/`. Each is imported from its module
when it is first used: an import of all takes 0.2 s of CPU, which a command that needs none of it,
as `vmibridge --version`, does not have to pay. `typing` would be a quarter of `vmibridge health`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:  # which type checkers take for true, by its name
    from vmibridge.backends import open_backend
    from vmibridge.bridge.context import BridgeContext
    from vmibridge.bridge.contract import (
        STANDARD_FALLBACK,
        STANDARD_MAGIC,
        STANDARD_VERIFY_VALUE3,
        STANDARD_VERIFY_VALUE4,
        STANDARD_WAIT,
        BridgeContract,
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
    from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate
    from vmibridge.engine.server import BridgeServer
    from vmibridge.errors import Failed, GuestMemoryError, VmiBridgeError
    from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

__version__ = "0.2.0"
"""That of the newest dated section of CHANGELOG.md."""

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
    "AddressRange",
    "Bridge",
    "BridgeContext",
    "BridgeContract",
    "BridgeDispatch",
    "BridgeHandler",
    "BridgePacket",
    "BridgeResponse",
    "BridgeServer",
    "Failed",
    "Gate",
    "GuestBytes",
    "GuestExit",
    "GuestInt",
    "GuestMemoryError",
    "GuestRoom",
    "GuestText",
    "HostOutput",
    "Outcome",
    "OutcomeKind",
    "Policy",
    "Quota",
    "Rate",
    "RegisterWrites",
    "Registers",
    "Room",
    "StandardHandler",
    "Status",
    "StatusKind",
    "TrapEvent",
    "TrapReason",
    "VmiBridgeError",
    "__version__",
    "method",
    "open_backend",
]

# The imports above, for the interpreter. A test holds the two against each other.
_NAMES_OF = {
    "backends": ("open_backend",),
    "bridge.context": ("BridgeContext",),
    "bridge.contract": (
        "STANDARD_FALLBACK",
        "STANDARD_MAGIC",
        "STANDARD_VERIFY_VALUE3",
        "STANDARD_VERIFY_VALUE4",
        "STANDARD_WAIT",
        "BridgeContract",
    ),
    "bridge.dispatch": ("Bridge", "BridgeDispatch"),
    "errors": ("Failed", "GuestMemoryError", "VmiBridgeError"),
    "vm.trap": ("RegisterWrites", "Registers", "TrapEvent", "TrapReason"),
    "bridge.guest_exit": ("GuestExit",),
    "bridge.handler": ("BridgeHandler", "method"),
    "bridge.outcome": ("Outcome", "OutcomeKind"),
    "bridge.packet": ("BridgePacket",),
    "bridge.parameters": (
        "I8",
        "I16",
        "I32",
        "I64",
        "U8",
        "U16",
        "U32",
        "U64",
        "GuestBytes",
        "GuestInt",
        "GuestRoom",
        "GuestText",
        "HostOutput",
        "Room",
    ),
    "engine.access_policy": ("AddressRange", "Policy", "Quota", "Rate"),
    "bridge.response": ("BridgeResponse",),
    "engine.server": ("BridgeServer",),
    "bridge.standard": ("StandardHandler",),
    "bridge.status": ("Gate", "Status", "StatusKind"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


if not TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name: str) -> object:
        """A public name that is used for the first time (PEP 562); it stays in the module."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
