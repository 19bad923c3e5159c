"""What a handler answers to, and what it proves to the guest.

The standard contract is that of vmi-utils 0.11 and later. A guest that checks the
two stamps tells an answer from a missing host, which leaves its registers alone.
"""

from typing import Any

import msgspec
from msgspec.structs import force_setattr

from vmibridge.bridge.numbers import unsigned
from vmibridge.bridge.response import BridgeResponse, T
from vmibridge.bridge.status import Gate

__all__ = [
    "STANDARD_MAGIC",
    "STANDARD_VERIFY_VALUE3",
    "STANDARD_VERIFY_VALUE4",
    "STANDARD_WAIT",
    "BridgeContract",
    "GuestRead",
]

STANDARD_MAGIC = 0x4249_4D56
"""`VMIB`, read as little-endian bytes."""
STANDARD_VERIFY_VALUE3 = 0x2133_5352_2D49_4D56
"""`VMI-RS3!`; an x86 guest sees the low 32 bits."""
STANDARD_VERIFY_VALUE4 = 0x2134_5352_2D49_4D56
"""`VMI-RS4!`; an x86 guest sees the low 32 bits."""

STANDARD_WAIT: BridgeResponse[Any] = BridgeResponse(value1=int(Gate.WAIT))
"""The gate's WAIT: the guest sleeps (upstream: 250 ms) and sends the request again."""

STANDARD_FALLBACK: BridgeResponse[Any] = BridgeResponse(
    int(Gate.ABORT), None, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
)
"""A fallback that a guest of the standard contract understands: it accepts no answer without both
stamps. Its gates and a file transfer end at ABORT."""


class BridgeContract(msgspec.Struct, frozen=True, gc=False):
    """The request that a handler takes, its magic, and its stamps.

    Raises `TypeError` for a field that is no whole number, `ValueError` for one that is out of
    its range.
    """

    request: int
    """16 bits."""
    magic: int | None = None
    """32 bits; `None` takes any magic."""
    verify_value1: int | None = None
    """64 bits; written over what the handler set, only on *handled*. So are the others."""
    verify_value2: int | None = None
    verify_value3: int | None = None
    verify_value4: int | None = None

    def __post_init__(self) -> None:
        force_setattr(self, "request", unsigned(self.request, "REQUEST", 16))
        if self.magic is not None:
            force_setattr(self, "magic", unsigned(self.magic, "MAGIC", 32))
        for slot, value in enumerate(self.verify_values, 1):
            if value is not None:
                number = unsigned(value, f"VERIFY_VALUE{slot}", 64)
                force_setattr(self, f"verify_value{slot}", number)

    @property
    def verify_values(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The four stamps, in order."""
        return (self.verify_value1, self.verify_value2, self.verify_value3, self.verify_value4)

    def stamp(self, response: BridgeResponse[T]) -> BridgeResponse[T]:
        """The response with this contract's stamps over the handler's values."""
        if type(response) is not BridgeResponse:
            response = BridgeResponse(*response.values, response.output)
        # A copy: both its values and the stamps were checked where they were made, and a new one
        # would be checked again, for each answer. msgspec's stubs lack `__copy__`.
        stamped: BridgeResponse[T] = response.__copy__()  # type: ignore[attr-defined]
        if (value := self.verify_value1) is not None:
            force_setattr(stamped, "value1", value)
        if (value := self.verify_value2) is not None:
            force_setattr(stamped, "value2", value)
        if (value := self.verify_value3) is not None:
            force_setattr(stamped, "value3", value)
        if (value := self.verify_value4) is not None:
            force_setattr(stamped, "value4", value)
        return stamped


class GuestRead(msgspec.Struct, frozen=True, gc=False):
    """Guest memory that a handler is known to read: it can travel with the trap.

    Raises `ValueError` for a field that is out of its range.
    """

    address: int
    """Which of value1 to value4 has the virtual address, 1 to 4."""
    size: int
    """Bytes that are read, at the most; up to 64 KiB."""
    size_in: int | None = None
    """Which value has the number of bytes, where the guest tells it."""
    method: int | None = None
    """Only for this method code; `None`: for all."""

    def __post_init__(self) -> None:
        if self.address not in (1, 2, 3, 4) or self.size_in not in (None, 1, 2, 3, 4):
            raise ValueError(f"values have the numbers 1 to 4: {self!r}")
        if not 0 < self.size <= 64 << 10:
            raise ValueError(f"a read that travels has 1 to 65536 bytes, got {self.size}")
        if self.method is not None and self.method >> 16:
            raise ValueError(f"a method code has 16 bits, got {self.method:#x}")
