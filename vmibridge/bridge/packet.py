"""A request of the guest, as decoded from its registers.

Widths: `reference` table "A request: what the guest puts in registers" of the
bridge protocol (vmi-utils, module `bridge`): magic 32 bits, request and method 16
bits each, four values of 64 bits.
"""

import msgspec

__all__ = ["BridgePacket"]


class BridgePacket(msgspec.Struct, frozen=True, gc=False):
    """One request: who is asked (`magic`, `request`), for what (`method`), with what.

    Raises `ValueError` for a field that is out of its range. A packet that comes
    from a guest is always in range: it came from registers.
    """

    magic: int
    """32 bits: the family of handlers."""
    request: int
    """16 bits: the handler within the family."""
    method: int
    """16 bits: what is asked of the handler."""
    value1: int = 0
    """64 bits, as are the other values; x86 guests fill the low 32."""
    value2: int = 0
    value3: int = 0
    value4: int = 0

    def __post_init__(self) -> None:
        # A negative number stays negative under `>>`, so one test takes both ends.
        if (
            self.magic >> 32
            or (self.request | self.method) >> 16
            or (self.value1 | self.value2 | self.value3 | self.value4) >> 64
        ):
            raise ValueError(f"out of range: {self!r} (magic 32 bits, codes 16, values 64)")

    @property
    def values(self) -> tuple[int, int, int, int]:
        """The four values, in order."""
        return (self.value1, self.value2, self.value3, self.value4)

    def with_value1(self, value: int) -> "BridgePacket":
        """A copy with another `value1`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value1=value)

    def with_value2(self, value: int) -> "BridgePacket":
        """A copy with another `value2`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value2=value)

    def with_value3(self, value: int) -> "BridgePacket":
        """A copy with another `value3`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value3=value)

    def with_value4(self, value: int) -> "BridgePacket":
        """A copy with another `value4`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value4=value)
