"""What a typed method takes and gives: the types of its annotations, and how words become values.

    async def put(self, handle: U32, data: Annotated[bytes, GuestBytes(1 << 20)]) -> U32: ...

To a type checker these are `int`, `str` and `bytes`. A word is one value of a request, 64 bits:

| annotation | words | what the guest gives |
|---|---|---|
| `U8` to `U64`, `I8` to `I64`; `int` is `U64` | 1 | the number; a signed one extended by its sign |
| `bool` | 1 | 0 or 1 |
| an `IntEnum`, an `IntFlag` | 1 | a member; bits that have a name |
| `Annotated[str, GuestText(LIMIT)]` | 1 | the address of text that ends with a NUL |
| `Annotated[bytes, GuestBytes(LIMIT)]` | 2 | an address, and a length in bytes |
| `Annotated[Room, GuestRoom(LIMIT)]` | 2 | the same, of memory that the method fills |

`... | None` after one of the last three: address 0 is `None`. A method gives a number, a member, or
`None`, which is 0; or `Annotated[TYPE, HostOutput()]`, which is for the host alone.
"""

import enum
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from vmibridge.bridge.numbers import MAX_SHOWN
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import MAX_ACCESS, GuestMemory, plain_bytes

__all__ = [
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
]

_MASK64 = (1 << 64) - 1


class GuestInt(msgspec.Struct, frozen=True):
    """A whole number of a width. Raises `ValueError` for one that no C type has."""

    bits: int
    """8, 16, 32 or 64."""
    signed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 16, 32, 64):
            raise ValueError(f"a number has 8, 16, 32 or 64 bits, not {self.bits!r}")


U8: TypeAlias = Annotated[int, GuestInt(8)]
U16: TypeAlias = Annotated[int, GuestInt(16)]
U32: TypeAlias = Annotated[int, GuestInt(32)]
U64: TypeAlias = Annotated[int, GuestInt(64)]
I8: TypeAlias = Annotated[int, GuestInt(8, signed=True)]
I16: TypeAlias = Annotated[int, GuestInt(16, signed=True)]
I32: TypeAlias = Annotated[int, GuestInt(32, signed=True)]
I64: TypeAlias = Annotated[int, GuestInt(64, signed=True)]


def _check_limit(limit: object) -> None:
    if type(limit) is not int or not 0 < limit <= MAX_ACCESS:
        raise ValueError(f"a limit is 1 to {MAX_ACCESS} bytes, not {limit!r}")


class GuestText(msgspec.Struct, frozen=True):
    """Text that ends with a NUL character. Raises `ValueError` for a limit out of range."""

    limit: int
    """Bytes without the NUL, at the most; up to 16 MiB."""
    encoding: Literal["utf-8", "utf-16-le"] = "utf-8"

    def __post_init__(self) -> None:
        _check_limit(self.limit)
        if self.encoding == "utf-16-le" and self.limit % 2:
            raise ValueError(f"a limit of UTF-16 is even, not {self.limit}")
        if self.encoding not in ("utf-8", "utf-16-le"):
            raise ValueError(f"text is 'utf-8' or 'utf-16-le', not {self.encoding!r}")


class GuestBytes(msgspec.Struct, frozen=True):
    """Bytes that the guest gives. Raises `ValueError` for a limit out of range."""

    limit: int
    """Bytes, at the most; up to 16 MiB."""

    def __post_init__(self) -> None:
        _check_limit(self.limit)


class GuestRoom(msgspec.Struct, frozen=True):
    """Memory that the method fills. Raises `ValueError` for a limit out of range."""

    limit: int
    """Bytes of the room, at the most; up to 16 MiB."""

    def __post_init__(self) -> None:
        _check_limit(self.limit)


class HostOutput(msgspec.Struct, frozen=True):
    """What a method gives is its output, of whatever type, and stays on the host: the guest gets 0
    in value2.

        async def exit(self, status: U32) -> Annotated[GuestExit, HostOutput()]: ...
    """


class Room:
    """Memory of the guest that a method may fill. All of it could be written when it began."""

    __slots__ = ("_address", "_memory", "capacity", "fault")

    def __init__(self, memory: GuestMemory, address: int, capacity: int) -> None:
        self._memory = memory
        self._address = address
        self.capacity: int = capacity
        """Bytes."""
        self.fault: GuestMemoryError | None = None
        """What the last `fill` failed by."""

    async def fill(self, data: bytes, offset: int = 0) -> int:
        """Put `data` at an offset in bytes, and return how many bytes that are.

        Raises `ValueError` when it does not fit: see `capacity`. Raises `GuestMemoryError` when
        the guest has taken its memory away, which is answered like a parameter that is wrong.
        """
        data = plain_bytes(data)
        if offset < 0 or offset + len(data) > self.capacity:
            raise ValueError(
                f"{len(data)} bytes at {offset} do not fit into a room of {self.capacity}"
            )
        try:
            await self._memory.write(self._address + offset, data)
        except GuestMemoryError as error:
            self.fault = error
            raise
        return len(data)


Spec: TypeAlias = GuestInt | GuestText | GuestBytes | GuestRoom


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of a typed method, or what it gives."""

    name: str
    spec: Spec
    members: type[enum.IntEnum] | type[enum.IntFlag] | type[bool] | None = None
    """What a number is a member of."""
    optional: bool = False
    """Address 0 is `None`."""

    @property
    def words(self) -> int:
        """1 or 2."""
        return 2 if isinstance(self.spec, GuestBytes | GuestRoom) else 1

    @property
    def is_wide(self) -> bool:
        """Whether a word of 32 bits may be too short for it."""
        return isinstance(self.spec, GuestInt) and self.spec.bits == 64


def numbers_of(members: type[enum.IntEnum] | type[enum.IntFlag]) -> list[int]:
    """The numbers of all members. Not their values, which a class may choose; and those of a flag
    with several bits, or none, which Python counts among the aliases."""
    return [int(each) for each in members.__members__.values()]


def number_reader(parameter: Parameter) -> Callable[[int], Any]:
    """From a word of 64 bits to the value. It raises `ValueError` for one out of range."""
    spec = parameter.spec
    assert isinstance(spec, GuestInt)
    read = _signed_reader(spec.bits) if spec.signed else _unsigned_reader(spec.bits)
    members = parameter.members
    if members is None:
        return read
    if members is bool:

        def read_bool(word: int) -> bool:
            if word > 1:
                raise ValueError("neither 0 nor 1")
            return word == 1

        return read_bool
    if issubclass(members, enum.IntFlag):
        named = 0
        for number in numbers_of(members):
            named |= number
        flags = members

        def read_flags(word: int) -> enum.IntFlag:
            if word & ~named:
                raise ValueError("a bit without a name")
            return flags(word)

        return read_flags
    assert issubclass(members, enum.IntEnum)
    values = {int(each): each for each in members}

    def read_member(word: int) -> enum.IntEnum:
        number = read(word)
        found = values.get(number)
        if found is None:
            raise ValueError("no member")
        return found

    return read_member


def _unsigned_reader(bits: int) -> Callable[[int], int]:
    def read(word: int) -> int:
        if word >> bits:
            raise ValueError("too large")
        return word

    return read


def _signed_reader(bits: int) -> Callable[[int], int]:
    sign = 1 << (bits - 1)

    def read(word: int) -> int:
        number = word - (1 << 64) if word >> 63 else word
        if not -sign <= number < sign:
            raise ValueError("out of range")
        return number

    return read


def word_of(parameter: Parameter, value: object) -> int:
    """The word of 64 bits for what a method gives.

    Raises `TypeError` for what is no whole number, `ValueError` for one out of range.
    """
    spec = parameter.spec
    assert isinstance(spec, GuestInt)
    if not isinstance(value, int):
        raise TypeError(f"{parameter.name} is a whole number, not of type {type(value).__name__}")
    number = int(value)
    low = -(1 << (spec.bits - 1)) if spec.signed else 0
    high = 1 << (spec.bits - spec.signed)
    if not low <= number < high or (parameter.members is bool and number > 1):
        shown = f"{number:#x}" if number.bit_length() <= MAX_SHOWN else "far too large"
        raise ValueError(f"{parameter.name} is {shown}, which {spec.bits} bits do not hold")
    return number & _MASK64
