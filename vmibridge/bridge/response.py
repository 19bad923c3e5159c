"""An answer of the host, before it goes into registers.

A value that is `None` leaves its register as the guest left it. The output never
reaches the guest: it is for whoever consumes the outcomes on the host.
"""

from typing import Generic, TypeVar

import msgspec

__all__ = ["BridgeResponse"]

T = TypeVar("T")
U = TypeVar("U")


class BridgeResponse(msgspec.Struct, Generic[T], frozen=True):
    """Four optional values of 64 bits, and an optional typed output.

    Raises `ValueError` for a value that is out of 64 bits.
    """

    value1: int | None = None
    value2: int | None = None
    value3: int | None = None
    value4: int | None = None
    output: T | None = None

    def __post_init__(self) -> None:
        # A negative number stays negative under `>>`, so one test takes both ends.
        if (
            (self.value1 or 0) | (self.value2 or 0) | (self.value3 or 0) | (self.value4 or 0)
        ) >> 64:
            raise ValueError(f"out of range: {self!r} (values have 64 bits)")

    @property
    def values(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The four values, in order."""
        return (self.value1, self.value2, self.value3, self.value4)

    def with_value1(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value1`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value1=value)

    def with_value2(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value2`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value2=value)

    def with_value3(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value3`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value3=value)

    def with_value4(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value4`. Raises `ValueError` out of 64 bits."""
        return msgspec.structs.replace(self, value4=value)

    def with_output(self, output: U) -> "BridgeResponse[U]":
        """A copy that carries `output` to the consumer of the outcomes."""
        return BridgeResponse(self.value1, self.value2, self.value3, self.value4, output)
