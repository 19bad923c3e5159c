"""Let the guest write to the host's log.

| method | value1 in | value2 in | value1 out | value2 out |
|---|---|---|---|---|
| 0x0001 DEBUG | address of the text, UTF-8 | its length in bytes | status | bytes taken |
| 0x0002 INFO | as above | | | |
| 0x0003 WARNING | as above | | | |
| 0x0004 ERROR | as above | | | |

The status is success, or invalid parameters for a text that is too long or not
readable. Text below the configured level is taken and dropped: the guest cannot tell.

Lines go to the logger `vmibridge.guest`, with `vm` and `vcpu` as attributes of the
record too. What a guest writes is hostile: every character that is not printable, and
every byte that is not UTF-8, becomes a backslash escape, so that it can neither begin a
line of its own nor steer the terminal that shows it.
"""

import logging
from typing import Literal

import msgspec

from vmibridge import (
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    StandardHandler,
    Status,
    StatusKind,
    method,
)
from vmibridge.text import printable
from vmibridge.vm.memory import MAX_ACCESS

log: logging.Logger = logging.getLogger("vmibridge.guest")

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class Log(StandardHandler[str]):
    """Writes the guest's text to the log; the escaped text is its output."""

    REQUEST = 0x0021

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """What is logged. Raises `ValueError` if a value is out of range."""

        level: Literal["debug", "info", "warning", "error"] = "debug"
        """The least level that is logged."""
        limit: int = 4096
        """Bytes of one text, at most; a longer one is refused."""

        def __post_init__(self) -> None:
            if self.level not in _LEVELS:
                raise ValueError(f"level is one of {', '.join(_LEVELS)}, got {self.level!r}")
            if not 1 <= self.limit <= MAX_ACCESS:
                raise ValueError(f"limit is 1 to {MAX_ACCESS} bytes, got {self.limit!r}")

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or self.Settings()
        self._level = _LEVELS[self._settings.level]

    @method(0x0001)
    async def debug(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Log a text as debug."""
        return await self._log(vmi, packet, logging.DEBUG)

    @method(0x0002)
    async def info(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Log a text as info."""
        return await self._log(vmi, packet, logging.INFO)

    @method(0x0003)
    async def warning(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Log a text as a warning."""
        return await self._log(vmi, packet, logging.WARNING)

    @method(0x0004)
    async def error(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Log a text as an error."""
        return await self._log(vmi, packet, logging.ERROR)

    async def _log(
        self, vmi: BridgeContext, packet: BridgePacket, level: int
    ) -> BridgeResponse[str]:
        stage = packet.method & 0xFF
        invalid = Status(stage, StatusKind.INVALID_PARAMETERS).encode()
        if packet.value2 > self._settings.limit:
            return BridgeResponse(invalid, 0)
        try:
            raw = await vmi.memory.read(packet.value1, packet.value2)
        except GuestMemoryError:
            return BridgeResponse(invalid, 0)
        text = printable(raw.decode("utf-8", "backslashreplace"))
        if level >= self._level:
            place = {"vm": vmi.vm, "vcpu": vmi.vcpu}
            log.log(level, "vm %s vcpu %d: %s", printable(vmi.vm), vmi.vcpu, text, extra=place)
        return BridgeResponse(Status(stage).encode(), len(raw), output=text)
