"""An answer of the host, before it goes into registers.

- A value that is `None` leaves its register as the guest left it. Any other is an exact `int`
  of 64 bits from here on: registers, recordings and frames take nothing else, and
  what they do not take would be found out only when the answer is on its way.
- The output never reaches the guest: it is for the consumer of the outcomes on the
  host. It is of any type, so whatever is done with it may raise; `output` has what
  does not, and the `repr` of a response does not either.
"""

from typing import Generic, TypeVar

import msgspec
from msgspec.structs import force_setattr

from vmibridge.bridge.numbers import unsigned
from vmibridge.text import repr_of, type_name

__all__ = ["BridgeResponse"]

T = TypeVar("T")
U = TypeVar("U")

_VALUES = ("value1", "value2", "value3", "value4")


class BridgeResponse(msgspec.Struct, Generic[T], frozen=True):
    """Four optional values of 64 bits, and an optional typed output.

    A value that is a whole number of another type (a bool, a member of an enum, whatever has
    `__index__`) becomes an `int`. Raises `TypeError` for a value that is no whole number, as 1.0,
    and `ValueError` for one that is out of 64 bits; both name the value.
    """

    value1: int | None = None
    value2: int | None = None
    value3: int | None = None
    value4: int | None = None
    output: T | None = None

    def __post_init__(self) -> None:
        # One is made for each answer, nearly always of exact ints: that is one expression. A
        # negative number stays negative under `>>`, so one test takes both ends.
        if (
            ((value := self.value1) is not None and (type(value) is not int or value >> 64))
            or ((value := self.value2) is not None and (type(value) is not int or value >> 64))
            or ((value := self.value3) is not None and (type(value) is not int or value >> 64))
            or ((value := self.value4) is not None and (type(value) is not int or value >> 64))
        ):
            for name in _VALUES:
                if (given := getattr(self, name)) is not None:
                    force_setattr(self, name, unsigned(given, name, 64))

    def __repr__(self) -> str:
        fields = [f"{name}={repr_of(getattr(self, name))}" for name in self.__struct_fields__]
        return f"{type_name(self)}({', '.join(fields)})"

    @property
    def values(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The four values, in order."""
        return (self.value1, self.value2, self.value3, self.value4)

    def with_value1(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value1`. Raises as the constructor does."""
        return msgspec.structs.replace(self, value1=value)

    def with_value2(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value2`. Raises as the constructor does."""
        return msgspec.structs.replace(self, value2=value)

    def with_value3(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value3`. Raises as the constructor does."""
        return msgspec.structs.replace(self, value3=value)

    def with_value4(self, value: int | None) -> "BridgeResponse[T]":
        """A copy with another `value4`. Raises as the constructor does."""
        return msgspec.structs.replace(self, value4=value)

    def with_output(self, output: U) -> "BridgeResponse[U]":
        """A copy that carries `output` to the consumer of the outcomes."""
        return BridgeResponse(self.value1, self.value2, self.value3, self.value4, output)
