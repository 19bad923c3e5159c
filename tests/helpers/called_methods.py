"""A handler with a method of every kind, for guests that call it by generated headers."""

from enum import IntEnum, IntFlag
from typing import Annotated

import anyio

from vmibridge import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    Failed,
    GuestBytes,
    GuestRoom,
    GuestText,
    Room,
    StandardHandler,
    method,
)

STUCK = 77
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


class Mode(IntEnum):
    """How something is opened."""

    READ = 1
    WRITE = 2
    NEITHER = -1


class Flags(IntFlag):
    A = 1
    B = 4
    TOP = 1 << 31


class Called(StandardHandler[int]):
    """Answers with what a guest can check."""

    REQUEST = 0x0120
    ANSWER = 42

    def __init__(self) -> None:
        self._opened = anyio.Event()

    class Problem(IntEnum):
        """Why `fails` fails."""

        NOT_THERE = 7

    @method(0x0001)
    async def unsigned(self, a: U8, b: U16, c: U32, d: U64) -> U64:
        """The sum."""
        return a + b + c + d & MASK64

    @method(0x0002)
    async def signed(self, a: I8, b: I16, c: I32, d: I64) -> I64:
        """The sum."""
        return a + b + c + d

    @method(0x0003)
    async def narrow(self, a: U8, b: I16) -> I16:
        """The difference; in registers everywhere."""
        return a - b

    @method(0x0004)
    async def three(self, a: U32, b: U32, c: I32) -> U32:
        """A sum; in registers for CPUID alone where the guest has 32 bits."""
        return a + b + c & MASK32

    @method(0x0005)
    async def members(self, mode: Mode, flags: Flags) -> Mode:
        """Another mode with a flag."""
        return Mode.NEITHER if flags == Flags.A | Flags.TOP else mode

    @method(0x0006)
    async def combine(self, flags: Flags, yes: bool) -> Flags:
        """One flag more, or less."""
        return flags | Flags.TOP if yes else flags & ~Flags.A

    @method(0x0007)
    async def negate(self, yes: bool) -> bool:
        """The other."""
        return not yes

    @method(0x0008)
    async def texts(
        self,
        name: Annotated[str, GuestText(300)],
        wide: Annotated[str, GuestText(300, "utf-16-le")],
        other: Annotated[str, GuestText(300)] | None,
    ) -> U32:
        """Their lengths, of eight bits each, and 255 for none."""
        return len(name) | len(wide) << 8 | (255 if other is None else len(other)) << 16

    @method(0x0009)
    async def total(self, start: U32, data: Annotated[bytes, GuestBytes(20_000)]) -> U64:
        """The sum of all bytes."""
        return start + sum(data)

    @method(0x000A)
    async def fill(self, byte: U8, into: Annotated[Room, GuestRoom(20_000)]) -> U32:
        """Fill all of the room."""
        return await into.fill(bytes([byte]) * into.capacity)

    @method(0x000B)
    async def reverse(
        self,
        data: Annotated[bytes, GuestBytes(20_000)] | None,
        into: Annotated[Room, GuestRoom(20_000)] | None,
    ) -> U32:
        """The bytes, the last one first."""
        if data is None or into is None:
            return (data is None) | (into is None) << 1
        return await into.fill(data[::-1])

    @method(0x000C)
    async def fails(self, code: U8) -> U32:
        """Always. From now on, `slow` is stuck again."""
        self._opened = anyio.Event()
        raise Failed(code, native=0xC000_0034)

    @method(0x000D)
    async def nothing(self) -> None:
        """Lets `slow` go on with what it is stuck at."""
        self._opened.set()

    @method(0x000E, soft_timeout=0.002)
    async def slow(self, value: U64) -> U64:
        """The value, inverted, after a while. It is stuck at 77 until `nothing` is called."""
        if value == STUCK:
            await self._opened.wait()
        else:
            await anyio.sleep(0.02)
        return ~value & MASK64

    @method(0x000F)
    async def plain(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        """value2 is value1 and value2; value1 is inverted."""
        return BridgeResponse(~packet.value1 & MASK64, packet.value1 + packet.value2 & MASK64)

    @method(0x0110)
    async def keywords(self, register: U8, call: U8, template: U8, NULL: U8) -> U8:
        """What is `default` */ or \\"""
        return register + call + template + NULL & 0xFF
