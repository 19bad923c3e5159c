"""A typed signature that cannot be served is refused when the class is made, by name."""

from enum import IntEnum, IntFlag
from functools import partial
from typing import Annotated

import pytest

from vmibridge import (
    I64,
    U8,
    U32,
    U64,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    GuestBytes,
    GuestInt,
    GuestRoom,
    GuestText,
    HostOutput,
    Room,
    method,
)
from vmibridge.bridge.contract import GuestRead

Name = Annotated[str, GuestText(100)]
Data = Annotated[bytes, GuestBytes(1 << 20)]


class Mode(IntEnum):
    READ = 1
    WRITE = 2


class Flags(IntFlag):
    A = 1
    HIGH = 1 << 40


def made(function, **attributes):
    return type("Files", (BridgeHandler,), {"REQUEST": 1, "ask": method(5)(function), **attributes})


def typed(cls):
    return cls.methods[5].typed


class TestWhichAreTyped:
    def test_vmi_and_packet_are_not_typed(self):
        async def ask(self, vmi, packet): ...

        assert typed(made(ask)) is None

    def test_nor_are_other_names_without_types(self):
        async def ask(self, guest, request): ...

        assert typed(made(ask)) is None

    def test_nor_is_what_takes_a_packet_by_its_type(self):
        async def ask(
            self, guest: BridgeContext, request: BridgePacket
        ) -> BridgeResponse[int] | None: ...

        async def quoted(self, guest: "Unknown", request: "vmibridge.BridgePacket"): ...  # noqa: F821 - no such

        assert typed(made(ask)) is None
        assert typed(made(quoted)) is None

    def test_one_without_parameters_is_typed(self):
        async def ask(self) -> None: ...

        assert typed(made(ask)).parameters == ()

    def test_the_context_is_no_parameter_of_the_guest(self):
        async def ask(self, size: U32, vmi: BridgeContext) -> U64: ...

        assert [each.name for each in typed(made(ask)).parameters] == ["size"]

    def test_a_method_that_overrides_a_plain_one_may_be_typed(self):
        async def plain(self, vmi, packet): ...

        async def ask(self, size: U32) -> U32: ...

        base = made(plain)
        assert typed(type("Other", (base,), {"ask": ask})) is not None


class TestRefused:
    @pytest.mark.parametrize(
        ("hint", "named"),
        [
            (str, "str"),
            (bytes, "bytes"),
            (float, "float"),
            (list[int], "list"),
            (Annotated[str, GuestBytes(4)], "str"),
            (Annotated[str, "unit"], "str"),
            (Annotated[str, GuestText(4), GuestText(5)], "str"),
            (int | str, "int | str"),
            (object, "object"),
        ],
    )
    def test_a_type_that_no_word_has(self, hint, named):
        async def ask(self, name) -> None: ...

        ask.__annotations__["name"] = hint
        with pytest.raises(TypeError, match=r"^Files\.ask: name is of type ") as refused:
            made(ask)
        assert named in str(refused.value)

    def test_more_words_than_a_request_has(self):
        async def ask(self, name: Name, data: Data, into: Annotated[Room, GuestRoom(9)]) -> U32: ...

        with pytest.raises(TypeError, match=r"^Files\.ask takes 5 words, a request has 4"):
            made(ask)

    def test_what_is_nearly_a_context_and_a_packet(self):
        async def turned(self, packet: BridgePacket, vmi: BridgeContext): ...

        async def with_more(self, packet: BridgePacket, size: U8): ...

        async def behind(self, size: U8, other: U8, packet: BridgePacket): ...

        for wrong in (turned, with_more, behind):
            with pytest.raises(TypeError, match=r"^Files\.ask: write \(self, vmi, packet\), or"):
                made(wrong)

        async def number(self, vmi, packet: U8) -> U8: ...

        with pytest.raises(TypeError, match=r"^Files\.ask does not take .*: vmi has no type"):
            made(number)

    def test_one_without_self(self):
        async def nothing() -> U8: ...

        async def size(size: U8) -> U8: ...

        for wrong in (nothing, size):
            with pytest.raises(TypeError, match=r"^Files\.ask takes no self"):
                made(wrong)

    def test_what_a_guest_cannot_leave_out(self):
        async def some(self, *sizes: U32) -> U32: ...

        async def default(self, size: U32 = 3) -> U32: ...

        for wrong in (some, default):
            with pytest.raises(TypeError, match=r"^Files\.ask: a guest gives all words"):
                made(wrong)

    def test_an_enum_without_members(self):
        class Empty(IntEnum):
            pass

        async def ask(self, mode: Empty) -> None: ...

        with pytest.raises(ValueError, match=r"^Files\.ask: mode is of type Empty, which has no"):
            made(ask)

    def test_a_flag_that_is_negative(self):
        class Negative(IntFlag):
            ALL = -1

        async def ask(self, flags: Negative) -> None: ...

        with pytest.raises(ValueError, match=r"^Files\.ask: flags is .* Negative, which has a"):
            made(ask)

    def test_a_member_that_is_far_too_large(self):
        class Large(IntEnum):
            A = 10**6000

        async def ask(self, mode: Large) -> None: ...

        with pytest.raises(ValueError, match=r"^Files\.ask: mode is far too large, which 64 bits"):
            made(ask)

    def test_what_is_no_function(self):
        async def ask(self, vmi, packet): ...

        for wrong in (None, property(ask), partial(ask)):
            with pytest.raises(
                TypeError, match=r"answers a method, so it has to (be async|have a name)$"
            ):
                method(5)(wrong)

    def test_a_parameter_without_a_type(self):
        async def ask(self, size: U32, other) -> None: ...

        with pytest.raises(TypeError, match=r"^Files\.ask does not take .*: other has no type"):
            made(ask)

    def test_one_for_keywords_alone(self):
        async def ask(self, *, size: U32) -> None: ...

        with pytest.raises(TypeError, match=r"^Files\.ask: size is for keywords alone"):
            made(ask)

    def test_a_type_that_cannot_be_found(self):
        async def ask(self, size: "Missing") -> None: ...  # noqa: F821 - no such

        with pytest.raises(TypeError, match=r"^Files\.ask: a type cannot be found: .*Missing"):
            made(ask)

    def test_two_contexts(self):
        async def ask(self, vmi: BridgeContext, other: BridgeContext) -> None: ...

        with pytest.raises(TypeError, match=r"^Files\.ask: other is a second BridgeContext"):
            made(ask)

    def test_one_that_does_not_say_what_it_gives(self):
        async def ask(self, size: U32): ...

        with pytest.raises(TypeError, match=r"^Files\.ask does not say what it gives"):
            made(ask)

    @pytest.mark.parametrize("hint", [str, Name, Data, tuple[int, int], U32 | None])
    def test_one_that_gives_what_no_value_has(self, hint):
        async def ask(self) -> None: ...

        ask.__annotations__["return"] = hint
        with pytest.raises(TypeError, match=r"^Files\.ask: what it gives is "):
            made(ask)

    def test_a_number_that_may_be_none(self):
        async def ask(self, size: U32 | None) -> None: ...

        with pytest.raises(TypeError, match=r"^Files\.ask: size is a number, which cannot be None"):
            made(ask)

    @pytest.mark.parametrize("limit", [0, -1, (16 << 20) + 1, 1.5, True, "9", None])
    def test_a_limit_out_of_range(self, limit):
        for spec in (GuestText, GuestBytes, GuestRoom):
            with pytest.raises(ValueError, match="a limit is 1 to 16777216 bytes"):
                spec(limit)

    def test_a_width_that_no_c_type_has(self):
        with pytest.raises(ValueError, match="8, 16, 32 or 64 bits, not 24"):
            GuestInt(24)

    def test_an_encoding_that_is_not_served(self):
        with pytest.raises(ValueError, match="'utf-8' or 'utf-16-le', not 'latin-1'"):
            GuestText(4, "latin-1")
        with pytest.raises(ValueError, match="a limit of UTF-16 is even, not 3"):
            GuestText(3, "utf-16-le")

    def test_a_member_that_the_width_does_not_hold(self):
        async def ask(self, flags: Annotated[Flags, GuestInt(32)]) -> None: ...

        told = r"^Files\.ask: flags is 0x10000000000, which 32 bits do not hold"
        with pytest.raises(ValueError, match=told):
            made(ask)


class TestWhatIsForTheHost:
    def test_is_of_any_type_and_nothing_of_it_is_for_the_guest(self):
        async def ask(self, a: U32) -> Annotated[list[str], HostOutput()]: ...

        assert typed(made(ask)).result is None

    def test_a_number_that_is_annotated_otherwise_is_for_the_guest(self):
        async def ask(self) -> Annotated[int, GuestInt(8)]: ...

        assert typed(made(ask)).result.spec == GuestInt(8)

    def test_is_no_parameter(self):
        async def ask(self, a: Annotated[str, HostOutput()]) -> U32: ...

        with pytest.raises(TypeError, match=r"a is of type .*HostOutput.*, not one of"):
            made(ask)


class TestWhatIsKnown:
    def test_the_width_of_an_enum_is_that_of_its_members(self):
        async def ask(
            self, mode: Mode, flags: Flags, narrow: Annotated[Mode, GuestInt(8)]
        ) -> Mode: ...

        assert [each.spec for each in typed(made(ask)).parameters] == [
            GuestInt(32),
            GuestInt(64),
            GuestInt(8),
        ]
        assert typed(made(ask)).result.members is Mode

    def test_plain_int_is_a_number_of_64_bits(self):
        async def ask(self, size: int, flag: bool, pages: Annotated[int, "pages"]) -> int: ...

        widths = [each.spec.bits for each in typed(made(ask)).parameters]
        assert widths == [64, 8, 64]

    def test_reads_that_travel_with_a_trap_follow_from_the_types(self):
        async def ask(self, size: I64, name: Name, data: Data) -> U8: ...

        assert made(ask).reads == (
            GuestRead(2, 101, method=5),
            GuestRead(3, 64 << 10, size_in=4, method=5),
        )

    def test_they_are_added_to_those_that_the_class_names_itself(self):
        async def ask(self, name: Annotated[str, GuestText(64, "utf-16-le")]) -> None: ...

        own = GuestRead(4, 8)
        cls = made(ask, reads=(own,))
        assert cls.reads == (own, GuestRead(1, 66, method=5))
        assert type("Other", (cls,), {}).reads == cls.reads, "once"
