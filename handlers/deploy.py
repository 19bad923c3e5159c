"""Say when a guest of vmi-rs may download and execute what it brings: its deploy, bit for bit.

    [handlers.deploy]
    download = "continue"
    execute = "continue"
    execute_after = "/run/lab/snapshot-taken"

| method | value1 | value2 | value1 of the answer |
|---|---|---|---|
| 0x0001 DOWNLOAD | attempt | HRESULT of the attempt before | a gate |
| 0x0002 EXECUTE | | | a gate |
| 0xffff EXIT | encoded status | native code | left alone |

A gate is CONTINUE, WAIT or ABORT; on WAIT the guest sleeps and asks again, without end. Attempt 0
asks whether the host is ready, and is sent also where there is nothing to download. An attempt
above 0 comes after a download that failed.

The handler keeps nothing of a guest: while a guest asks again and again, one host may take over
from another, and goes on where that one was.
"""

import logging
from typing import Literal

import anyio
import msgspec

from vmibridge import (
    STANDARD_WAIT,
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    Gate,
    StandardHandler,
    Status,
    method,
)
from vmibridge.handlers._upstream_exit import EXIT, exit_status
from vmibridge.text import printable

log: logging.Logger = logging.getLogger(__name__)

GateName = Literal["continue", "wait", "abort"]
_GATES = {"continue": Gate.CONTINUE, "wait": Gate.WAIT, "abort": Gate.ABORT}


class Deploy(StandardHandler[Status]):
    """Opens the gates of its settings. Its output is the status of a guest that is done.

    A class that derives from it may open them otherwise: by `may_download` and `may_execute`.
    """

    REQUEST = 0x0011
    wait = STANDARD_WAIT

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """The gates. Raises `ValueError` if a value is out of range."""

        download: GateName = "abort"
        """Whether the guest may begin, and download what it knows of."""
        attempts: int = 3
        """Downloads that may fail; at that many the guest is told to give up."""
        download_after: str | None = None
        """A file or a folder of the host: until it is there, CONTINUE is WAIT."""
        execute: GateName = "abort"
        """Whether it may execute what it has downloaded."""
        execute_after: str | None = None
        """As `download_after`."""

        def __post_init__(self) -> None:
            for name in ("download", "execute"):
                if getattr(self, name) not in _GATES:
                    raise ValueError(
                        f"{name} is one of {', '.join(_GATES)}, got {getattr(self, name)!r}"
                    )
            if self.attempts < 1:
                raise ValueError(f"attempts is 1 or more, got {self.attempts!r}")
            for name in ("download_after", "execute_after"):
                path = getattr(self, name)
                if path is not None and (not path or "\0" in path):
                    raise ValueError(f"{name} is the path of a file, got {path!r}")

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or self.Settings()

    async def may_download(self, attempt: int, hresult: int) -> Gate:
        """Whether a guest may download.

        `attempt` is 0 before the first one, and then the number of those that have failed, the last
        one with `hresult`, of 32 bits.
        """
        settings = self._settings
        if hresult and attempt >= settings.attempts:
            return Gate.ABORT
        return await _opened(settings.download, settings.download_after)

    async def may_execute(self) -> Gate:
        """Whether a guest may execute what it has."""
        return await _opened(self._settings.execute, self._settings.execute_after)

    @method(0x0001)
    async def download(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[Status]:
        """Whether the guest may download."""
        attempt, hresult = packet.value1, packet.value2 & 0xFFFF_FFFF
        gate = await self.may_download(attempt, hresult)
        if attempt and gate is not Gate.WAIT:
            log.warning(
                "vm %s: download %d failed with HRESULT %#010x: %s",
                *(printable(vmi.vm), attempt, hresult, gate.name),
            )
        return BridgeResponse(gate)

    @method(0x0002)
    async def execute(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[Status]:
        """Whether the guest may execute."""
        return BridgeResponse(await self.may_execute())

    @method(EXIT, may_wait=False)
    async def exit(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[Status]:
        """The guest is done."""
        return BridgeResponse(output=exit_status(packet))


async def _opened(gate: GateName, after: str | None) -> Gate:
    if gate == "continue" and after is not None and not await anyio.Path(after).exists():
        return Gate.WAIT
    return _GATES[gate]
