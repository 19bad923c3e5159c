"""A typed method: what a guest gives is checked before its body runs; its result is the answer."""

import struct
from enum import IntEnum, IntFlag
from typing import Annotated

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from paged_memory import FIRST, FRAMES, PAGE, SECOND, THIRD, P, U, paged

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
    HostOutput,
    OutcomeKind,
    Registers,
    Room,
    StandardHandler,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
)
from vmibridge.bridge.dispatch import Bridge
from vmibridge.testing import FakeMemory, FakeRoom, drive

pytestmark = pytest.mark.anyio

MASK64 = (1 << 64) - 1
STAMPS = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
WIDTHS = {U8: 8, U16: 16, U32: 32, U64: 64}
SIGNED = {I8: 8, I16: 16, I32: 32, I64: 64}


class Mode(IntEnum):
    READ = 1
    WRITE = 2
    NEITHER = -1


class Flags(IntFlag):
    A = 1
    B = 4


class Asked(StandardHandler[int]):
    REQUEST = 0x0110

    def __init__(self):
        self.calls = []

    def keep(self, *values):
        self.calls.append(values)

    @method(0x0101)
    async def unsigned(self, a: U8, b: U16, c: U32, d: U64) -> U64:
        self.keep(a, b, c, d)
        return d

    @method(2)
    async def signed(self, a: I8, b: I16, c: I32, d: I64) -> I64:
        self.keep(a, b, c, d)
        return d

    @method(3)
    async def members(self, mode: Mode, flags: Flags, yes: bool) -> Mode:
        self.keep(mode, flags, yes)
        return mode

    @method(4)
    async def text(
        self,
        name: Annotated[str, GuestText(8)],
        wide: Annotated[str, GuestText(8, "utf-16-le")],
        other: Annotated[str, GuestText(8)] | None,
    ) -> None:
        self.keep(name, wide, other)

    @method(5)
    async def data(self, handle: U32, data: Annotated[bytes, GuestBytes(5000)]) -> U32:
        self.keep(handle, data)
        return len(data)

    @method(6)
    async def into(
        self, vmi: BridgeContext, size: U32, into: Annotated[Room, GuestRoom(5000)]
    ) -> U32:
        self.keep(vmi.event.width, size)
        return await into.fill(b"x" * size)

    @method(7)
    async def fails(self, code: U8) -> U32:
        raise Failed(code, native=0xC000_0034)

    @method(8)
    async def gives_too_much(self, value: U64) -> U8:
        return value

    @method(9)
    async def gives_text(self) -> U8:
        return "1"

    @method(10)
    async def gives_nothing(self) -> None:
        return 1

    @method(12)
    async def fill(self, size: U32, into: Annotated[Room, GuestRoom(5000)]) -> U32:
        self.keep(size)
        return await into.fill(bytes(into.capacity))

    @method(11)
    async def two(self, first: U32, second: I32) -> I32:
        self.keep(first, second)
        return second


def packet(code, *values):
    return BridgePacket(STANDARD_MAGIC, 0x0110, code, *values)


def trap(reason=TrapReason.VMCALL, width=64):
    return TrapEvent(1, reason, Registers(), length=3, width=width)


async def ask(code, *values, memory=None, event=None):
    """The status, what value2 is, and what the method was called with."""
    handler = Asked()
    outcome = await drive(handler, packet(code, *values), memory, event=event)
    assert outcome.kind is OutcomeKind.HANDLED, outcome.error
    response = outcome.response
    assert (response.value3, response.value4) == STAMPS
    return Status.decode(response.value1), response.value2, handler.calls


def invalid(code, parameter):
    return Status(code & 0xFF, StatusKind.INVALID_PARAMETERS, parameter)


class TestNumbers:
    async def test_go_in_and_out(self):
        status, value, calls = await ask(0x0101, 255, 65535, 1 << 31, MASK64)
        assert status == Status(0x01)
        assert value == MASK64
        assert calls == [(255, 65535, 1 << 31, MASK64)]

    async def test_signed_ones_have_their_sign(self):
        status, value, calls = await ask(2, *(-n & MASK64 for n in (128, 32768, 1 << 31, 1 << 63)))
        assert (status, value) == (Status(2), 1 << 63)
        assert calls == [(-128, -32768, -(1 << 31), -(1 << 63))]

    async def test_members_are_members(self):
        status, value, calls = await ask(3, -1 & MASK64, 5, 1)
        assert (status, value) == (Status(3), MASK64)
        assert calls == [(Mode.NEITHER, Flags.A | Flags.B, True)]
        assert isinstance(calls[0][0], Mode)
        assert isinstance(calls[0][1], Flags)

    @pytest.mark.parametrize(
        ("code", "values", "parameter"),
        [
            (0x0101, (256, 0, 0, 0), 1),
            (0x0101, (0, 65536, 0, 0), 2),
            (0x0101, (0, 0, 1 << 32, 0), 3),
            (2, (128, 0, 0, 0), 1),
            (2, (0xFF, 0, 0, 0), 1),
            (2, (0, 0, 0xFFFF_FFFF, 0), 3),
            (3, (0, 0, 0), 1),
            (3, (3, 0, 0), 1),
            (3, (1, 2, 0), 2),
            (3, (1, MASK64, 0), 2),
            (3, (1, 1, 2), 3),
        ],
    )
    async def test_one_that_is_wrong_is_told_by_its_number(self, code, values, parameter):
        assert await ask(code, *values) == (invalid(code, parameter), 0, [])

    async def test_members_may_have_several_bits_and_any_value(self):
        class Rights(IntFlag):
            NONE = 0
            BOTH = 3
            HIGH = 0xF0

        class Colour(IntEnum):
            RED = 7, "red"

            def __new__(cls, number, value):
                made = int.__new__(cls, number)
                made._value_ = value
                return made

        class Paints(StandardHandler[int]):
            REQUEST = 0x0111

            @method(1)
            async def paint(self, rights: Rights, colour: Colour) -> Colour:
                assert rights == Rights.BOTH | Rights.HIGH
                assert colour is Colour.RED
                return colour

        request = BridgePacket(Paints.MAGIC, 0x0111, 1, 0xF3, 7)
        outcome = await drive(Paints(), request)
        assert (Status.decode(outcome.response.value1), outcome.response.value2) == (Status(1), 7)
        outcome = await drive(Paints(), msgspec.structs.replace(request, value1=4))
        assert Status.decode(outcome.response.value1) == invalid(1, 1)

    @pytest.mark.parametrize("given", [["a", "b"], 7, None])
    async def test_what_is_for_the_host_is_the_output_alone(self, given):
        class Tells(StandardHandler[object]):
            REQUEST = 0x0110

            @method(3)
            async def tell(self) -> Annotated[object, HostOutput()]:
                return given

        outcome = await drive(Tells(), BridgePacket(STANDARD_MAGIC, 0x0110, 3))
        assert outcome.output is given
        assert outcome.response.values == (Status(3).encode(), 0, *STAMPS)

    async def test_what_the_guest_gets_is_also_the_output(self):
        outcome = await drive(Asked(), packet(3, 1, 0, 0))
        assert outcome.response.output is Mode.READ


class TestText:
    async def test_is_read_up_to_its_nul(self):
        memory = {0x1000: b"n\xc3\xa4me\0more", 0x2000: "wide".encode("utf-16-le") + b"\0\0"}
        _, _, calls = await ask(4, 0x1000, 0x2000, 0, memory=memory)
        assert calls == [("n\u00e4me", "wide", None)]

    @pytest.mark.parametrize(
        ("name", "wide", "parameter"),
        [
            (b"no utf-8\xff"[-3:] + b"\0", b"\0\0", 1),
            (b"123456789\0", b"\0\0", 1),
            (b"a\0", b"12345678\x01\0\0\0", 2),
            (b"a\0", b"\x00\xd8\0\0", 2),
        ],
    )
    async def test_what_is_too_long_or_no_text_is_told(self, name, wide, parameter):
        told, _, calls = await ask(4, 0x1000, 0x2000, 0, memory={0x1000: name, 0x2000: wide})
        assert (told, calls) == (invalid(4, parameter), [])


class TestBuffers:
    @pytest.mark.parametrize("size", [0, 1, 5000])
    async def test_are_read_whole(self, size):
        data = bytes(number & 0xFF for number in range(size))
        status, value, calls = await ask(5, 7, 0x1000, size, memory={0x1000: data or b"-"})
        assert (status, value, calls) == (Status(5), size, [(7, data)])

    async def test_one_over_its_limit_is_not_read(self):
        assert await ask(5, 7, 0x1000, 5001) == (invalid(5, 2), 0, [])

    async def test_a_room_is_filled(self):
        memory = FakeMemory({0x1000: bytes(8)})
        status, value, _ = await ask(6, 3, 0x1000, 8, memory=memory)
        assert (status, value, memory[0x1000]) == (Status(6), 3, b"xxx" + bytes(5))

    async def test_a_room_where_no_memory_is_is_told_before_the_body_runs(self):
        assert await ask(12, 1, 0xDEAD_0000, 8, memory={0x1000: b"x"}) == (invalid(12, 2), 0, [])

    async def test_what_does_not_fit_into_a_room_is_a_fault_of_the_method(self):
        outcome = await drive(Asked(), packet(6, 9, 0x1000, 8), {0x1000: bytes(8)})
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error == "ValueError: 9 bytes at 0 do not fit into a room of 8"

    async def test_a_test_fills_a_room_of_its_own(self):
        room = FakeRoom(4)
        assert await Asked().fill(1, room) == 4
        assert await room.fill(b"ab", 1) == 2
        assert room.data == b"\0ab\0"
        with pytest.raises(ValueError, match="do not fit into a room of 4"):
            await room.fill(b"12345")


class TestPagesThatAreNotPresent:
    """The answer names the address to touch; nothing has run then."""

    async def asked(self, pages, code, *values, ring=3):
        handler = Asked()
        context, _ = paged(
            {FRAMES[FIRST]: b"abc".ljust(PAGE - 4, b"\0") + b"name"}, pages=pages, ring=ring
        )
        outcome = await Bridge(handler).dispatch(context, packet(code, *values))
        return Status.decode(outcome.response.value1), outcome.response.value2, handler.calls

    @pytest.mark.parametrize("write", [False, True])
    async def test_the_first_that_is_missing_is_named(self, write):
        code = 6 if write else 5
        told = await self.asked({SECOND: 0}, code, 1, SECOND - 8, 16)
        assert told == (Status(code, StatusKind.TOUCH), SECOND, [])

    async def test_so_is_the_one_where_a_text_goes_on(self):
        told = await self.asked({SECOND: 0}, 4, SECOND - 4, FIRST, 0)
        assert told == (Status(4, StatusKind.TOUCH), SECOND, [])

    async def test_so_is_a_page_that_is_read_only_until_it_is_written(self):
        pages = {SECOND: FRAMES[SECOND] | P | U}
        assert (await self.asked(pages, 5, 1, SECOND, 16))[0] == Status(5)
        told = await self.asked(pages, 6, 1, SECOND - 8, 16)
        assert told == (Status(6, StatusKind.TOUCH), SECOND, [])

    async def test_a_page_of_the_kernel_is_not_for_a_program(self):
        pages = {SECOND: FRAMES[SECOND] | P}
        assert await self.asked(pages, 5, 1, SECOND, 16) == (invalid(5, 2), 0, [])
        assert (await self.asked(pages, 5, 1, SECOND, 16, ring=0))[0] == Status(5)

    async def test_a_room_that_is_taken_away_while_the_method_waits_is_told_by_the_same(self):
        class Slow(Asked):
            @method(6)
            async def into(self, into: Annotated[Room, GuestRoom(64)], size: U32) -> U32:
                del pages[0]
                return await into.fill(b"x")

        class Memory:
            async def read_physical(self, event, address, size):
                if not pages and address >= 0x10_0000:
                    return bytes(size)
                return await whole.read_physical(event, address, size)

            async def write_physical(self, event, address, data):
                raise AssertionError("nothing is mapped")

        pages = [True]
        context, whole = paged()
        lost = BridgeContext(context.event, Memory())
        outcome = await Bridge(Slow()).dispatch(lost, packet(6, THIRD, 64, 1))
        status = Status(6, StatusKind.TOUCH).encode()
        assert outcome.response == BridgeResponse(status, THIRD, *STAMPS)


class TestFailures:
    async def test_failed_is_a_status_and_nothing_else(self, caplog):
        told = await ask(7, 9)
        assert told == (Status(7, StatusKind.FAILED, 9, 0xC000_0034), 0, [])
        assert not caplog.records

    @pytest.mark.parametrize(("code", "native"), [("no such note", 0), (1.5, 0), (0, "x")])
    def test_one_of_another_type_is_refused_where_it_is_raised(self, code, native):
        with pytest.raises(TypeError, match="code and native are whole numbers"):
            raise Failed(code, native=native)

    @pytest.mark.parametrize(("code", "native"), [(256, 0), (-1, 0), (0, 1 << 32), (0, -1)])
    def test_one_out_of_range_is_refused_where_it_is_raised(self, code, native):
        with pytest.raises(ValueError, match="code has 8 bits and native 32"):
            raise Failed(code, native=native)

    @pytest.mark.parametrize(
        ("code", "values", "error"),
        [
            (8, (256,), "ValueError: what it gives is 0x100, which 8 bits do not hold"),
            (9, (), "TypeError: what it gives is a whole number, not of type str"),
            (10, (), "TypeError: the method gave 1, and says that it gives None"),
        ],
    )
    async def test_what_it_does_not_say_that_it_gives_is_a_fault_of_the_method(
        self, code, values, error
    ):
        outcome = await drive(Asked(), packet(code, *values))
        assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, error)

    async def test_a_method_that_it_does_not_have_is_rejected(self):
        assert (await drive(Asked(), packet(99))).kind is OutcomeKind.REJECTED


class TestGuestsOf32Bits:
    async def test_words_are_in_registers_where_they_fit(self):
        for reason in (TrapReason.VMCALL, TrapReason.VMMCALL, TrapReason.CPUID):
            status, value, calls = await ask(
                11, 0xFFFF_FFFF, 0xFFFF_FFFE, event=trap(reason, width=32)
            )
            assert (status, value, calls) == (Status(11), -2 & MASK64, [(0xFFFF_FFFF, -2)])

    async def test_three_words_are_in_registers_for_cpuid_and_in_a_block_for_vmcall(self):
        memory = {0x1000: b"data", 0x2000: struct.pack("<4Q", 0, 7, 0x1000, 4)}
        cpuid = await ask(5, 7, 0x1000, 4, memory=memory, event=trap(TrapReason.CPUID, width=32))
        assert cpuid == (Status(5), 4, [(7, b"data")])
        vmcall = await ask(5, 0x2000, memory=memory, event=trap(width=32))
        assert vmcall == cpuid

    @pytest.mark.parametrize("reason", [TrapReason.CPUID, TrapReason.VMCALL])
    async def test_words_of_64_bits_are_in_a_block_and_so_is_what_the_method_gives(self, reason):
        block = struct.pack("<5Q", 0, 1, 2, 3, 1 << 40)
        memory = FakeMemory({0x2000: block})
        told = await ask(0x0101, 0x2000, memory=memory, event=trap(reason, width=32))
        assert told == (Status(1), 1 << 40, [(1, 2, 3, 1 << 40)])
        assert memory[0x2000] == (1 << 40).to_bytes(8, "little") + block[8:]

    async def test_a_block_that_is_not_there_is_no_parameter(self):
        assert await ask(0x0101, 0x5000, event=trap(width=32)) == (invalid(1, 0), 0, [])


words = st.integers(0, MASK64) | st.integers(0, 300) | st.integers(-300, -1).map(MASK64.__and__)


@pytest.mark.parametrize("code", [0x0101, 2, 3, 4, 5, 11, 12])
@settings(max_examples=examples(60))
@given(values=st.tuples(words, words, words, words), width=st.sampled_from([64, 32]))
def test_whatever_a_guest_gives_is_answered_with_a_status(code, values, width):
    import anyio

    if width == 32:
        values = tuple(value & 0xFFFF_FFFF for value in values)
    told, _, calls = anyio.run(lambda: ask(code, *values, event=trap(width=width)))
    if told.kind == StatusKind.SUCCESS:
        assert len(calls) == 1
    else:
        assert told.kind == StatusKind.INVALID_PARAMETERS
        assert calls == []
