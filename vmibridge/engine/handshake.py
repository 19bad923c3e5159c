"""The host itself: the handshake, by which a guest learns what it may rely on.

Request 0x0000 of the standard magic. Both stamps are on every answer, so an answer has
value1 and value2 to give:

| method | in | value1 of the answer | value2 |
|---|---|---|---|
| 0x0001 VERSION | | version: major in bits 16-31, minor in bits 0-15 | `Feature` bits |
| 0x0002 DEADLINES | | highest soft deadline, 0: there is none | highest hard deadline |
| 0x0003 LIMITS | value1: a `Limit` | that limit, 0: there is no such limit | how many there are |
| 0x0010 ECHO_LOW | value1, value2 | value1 | value2 |
| 0x0011 ECHO_HIGH | value3, value4 | value3 | value4 |

Rules:

- What it says fits 32 bits, so that x86 guests see all of it. An echo has the width of
  the registers that it came from.
- Times are in milliseconds, rounded up. What is larger than 0xffffffff, and what has no
  end, is 0xffffffff.
- Selectors of limits count from 1 without holes. Where a guest asks for a higher one
  than value2, the host is older than the guest.
- It never waits, and never touches the guest's memory.
"""

import math
from decimal import Decimal
from enum import IntEnum, IntFlag
from typing import ClassVar

import msgspec

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler, check_timeout, method
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.settings import ServerSettings
from vmibridge.vm.memory import MAX_ACCESS

VERSION = 0x0001_0000
"""1.0. A minor adds methods, features or limits; a major changes what was there."""
NO_END = 0xFFFF_FFFF
"""A time without end, and any number that 32 bits cannot hold."""


class Feature(IntFlag):
    """What a guest has to reckon with; 32 bits."""

    WAIT = 1 << 0
    """A request may be answered WAIT at its soft deadline: send it again for its result."""
    POLICY = 1 << 1
    """Requests may be denied by privilege level, address space or place."""
    QUOTA = 1 << 2
    """The rate of requests, or their bytes, are limited."""


class Limit(IntEnum):
    """What value1 of LIMITS asks for."""

    ACCESS = 1
    """Bytes of guest memory that the host reads or writes in one piece."""
    IN_FLIGHT = 2
    """Requests of the VM that may be in flight at a time."""
    RESULT_TIMEOUT = 3
    """Milliseconds that a result is kept for the guest to send its request again."""


class HostInfo(msgspec.Struct, frozen=True):
    """What a host tells its guests of itself. Raises `ValueError` if a value is out of range.

    Times are in seconds; `math.inf` has no end.
    """

    features: Feature
    soft_timeout: float | None
    """The highest soft deadline of any request; `None`: there is none."""
    timeout: float
    """The highest hard deadline of any request."""
    result_timeout: float
    """How long a result is kept for its retry; 0: not at all."""
    in_flight: int
    """Requests of one VM that may be in flight at a time."""

    def __post_init__(self) -> None:
        if self.features >> 32:
            raise ValueError(f"features have 32 bits, got {self.features:#x}")
        check_timeout(self.soft_timeout, "soft_timeout")
        check_timeout(self.timeout)
        if not self.result_timeout >= 0:
            raise ValueError(f"a result is kept for 0 seconds or more, got {self.result_timeout!r}")
        if self.in_flight < 1:
            raise ValueError(f"at least one request is in flight, got {self.in_flight!r}")


class Host(BridgeHandler[None]):
    """Answers for the host itself; see the table of this module."""

    MAGIC: ClassVar[int | None] = STANDARD_MAGIC
    REQUEST: ClassVar[int] = 0x0000
    VERIFY_VALUE3: ClassVar[int | None] = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4: ClassVar[int | None] = STANDARD_VERIFY_VALUE4
    name = "host"
    shared = True
    instant = True

    def __init__(self, info: HostInfo) -> None:
        soft = 0 if info.soft_timeout is None else _milliseconds(info.soft_timeout)
        self._version = BridgeResponse[None](VERSION, int(info.features))
        self._deadlines = BridgeResponse[None](soft, _milliseconds(info.timeout))
        self._limits: dict[int, int] = {
            Limit.ACCESS: MAX_ACCESS,
            Limit.IN_FLIGHT: min(info.in_flight, NO_END),
            Limit.RESULT_TIMEOUT: _milliseconds(info.result_timeout),
        }

    @method(0x0001)
    async def version(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """Tell the version of the handshake, and the features of this host."""
        return self._version

    @method(0x0002)
    async def deadlines(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """Tell the highest soft and hard deadlines, in milliseconds."""
        return self._deadlines

    @method(0x0003)
    async def limits(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """Tell the limit that value1 selects, and how many there are."""
        return BridgeResponse(self._limits.get(packet.value1, 0), len(self._limits))

    @method(0x0010)
    async def echo_low(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """Send value1 and value2 back."""
        return BridgeResponse(packet.value1, packet.value2)

    @method(0x0011)
    async def echo_high(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """Send value3 and value4 back, as value1 and value2; an x86 VMCALL has none: zeros."""
        return BridgeResponse(packet.value3, packet.value4)


def _milliseconds(seconds: float) -> int:
    if math.isinf(seconds):
        return NO_END
    # As it is written in decimals: in binary 0.07 * 1000 is a little over 70, and would be 71.
    return min(math.ceil(Decimal(str(seconds)) * 1000), NO_END)


def with_handshake(bridge: Bridge, settings: ServerSettings) -> Bridge:
    """`bridge`, and what answers the handshake, where that is wanted and of use."""
    speaks = any(entry.contract.magic == STANDARD_MAGIC for entry in bridge.entries)
    if not (settings.handshake and speaks):
        return bridge
    return Bridge(bridge, Host(_host_info(bridge, settings)))


def _host_info(bridge: Bridge, settings: ServerSettings) -> HostInfo:
    """What holds for the requests of a bridge, at the most."""
    terms = [
        settings.terms(entry.target, method)
        for entry in bridge.entries
        for method in (entry.handler.methods if entry.handler and entry.handler.methods else (0,))
    ]
    soft = [each.soft_timeout for each in terms if each.soft_timeout < each.timeout]
    features = Feature(0)
    if soft:
        features |= Feature.WAIT
    if settings.policy is not None:
        features |= Feature.POLICY
        if settings.policy.has_quota:
            features |= Feature.QUOTA
    return HostInfo(
        features,
        max(soft, default=None),
        max(each.timeout for each in terms),
        settings.result_timeout,
        min(settings.in_flight, settings.in_flight_total),
    )
