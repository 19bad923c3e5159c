"""How guests of vmi-rs say that they are done."""

import msgspec

from vmibridge import BridgePacket, Status

__all__ = ["EXIT", "exit_status"]

EXIT = 0xFFFF
"""The method code."""


def exit_status(packet: BridgePacket) -> Status:
    """What a guest reports: older ones have the native code in value2, newer ones in the status."""
    status = Status.decode(packet.value1)
    if not status.native:
        status = msgspec.structs.replace(status, native=packet.value2 & 0xFFFF_FFFF)
    return status
