"""The model of handlers: what a guest needs to know of them, and what is refused."""

from enum import IntEnum, IntFlag
from typing import Annotated

import msgspec
import pytest
from called_methods import Called

from vmibridge import (
    I8,
    U32,
    U64,
    BridgeHandler,
    BridgeResponse,
    GuestBytes,
    GuestText,
    StandardHandler,
    method,
)
from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
)
from vmibridge.errors import HandlerLoadError
from vmibridge.guest_header import EnumModel, ParameterModel, model_of, models_of


class Keeper(StandardHandler[int]):
    """Keeps things."""

    REQUEST = 0x0130
    SLOTS = 12
    _HIDDEN = 1
    soft_timeout = 1.5

    class Problem(IntEnum):
        FULL = 1

    @method(0x0002)
    async def put(
        self, name: Annotated[str, GuestText(64)], data: Annotated[bytes, GuestBytes(4096)] | None
    ) -> U32:
        """Keep it.

        For as long as there is room.
        """
        return 0

    @method(0x0001)
    async def wide(self, number: U64) -> I8:
        return 0


def test_it_has_the_contract_the_methods_by_code_and_the_docs():
    model = model_of(Keeper)
    assert (model.name, model.request, model.magic) == ("keeper", 0x0130, STANDARD_MAGIC)
    assert model.stamps == (None, None, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
    assert model.doc == "Keeps things."
    assert model.constants == {"SLOTS": 12}
    assert model.enums == (EnumModel("Problem", False, 32, False, {"FULL": 1}),)
    wide, put = model.methods
    assert [(each.name, each.code, each.wait) for each in (wide, put)] == [
        ("wide", 1, 0x100),
        ("put", 2, 0x100),
    ]
    assert put.doc == "Keep it.\n\nFor as long as there is room."
    assert put.parameters == (
        ParameterModel("name", "text", 1, limit=64, encoding="utf-8"),
        ParameterModel("data", "bytes", 2, limit=4096, optional=True),
    )
    assert put.result == ParameterModel("", "number", 1, bits=32)
    assert (put.words, put.is_wide, wide.words, wide.is_wide) == (3, False, 1, True)


def test_an_instance_gives_what_its_class_does():
    assert model_of(Called()) == model_of(Called)


def test_it_is_json():
    model = model_of(Called)
    assert msgspec.json.decode(msgspec.json.encode(model), type=type(model)) == model


class Plain(BridgeHandler[None]):
    REQUEST = 0x0131

    async def handle(self, vmi, packet):
        """Answers any method."""


class Waits(Plain):
    may_wait = True


class Stamped(Plain):
    soft_timeout = 1.0
    VERIFY_VALUE1 = 7


@pytest.mark.parametrize(("handler", "wait"), [(Plain, None), (Waits, 1), (Stamped, 7)])
def test_a_handler_of_packets_has_one_method_for_all_codes(handler, wait):
    (only,) = model_of(handler).methods
    assert (only.code, only.typed, only.wait, only.doc) == (
        None,
        False,
        wait,
        "Answers any method.",
    )


def test_the_docs_of_values_are_those_of_the_module():
    assert __doc__.strip() in model_of(Plain).doc
    assert __doc__.strip() not in model_of(Keeper).doc


class Large(IntFlag):
    ALL = (1 << 64) - 1


class Huge(IntEnum):
    MORE = 1 << 64


def typed(**attributes):
    """A class with a method, made by hand."""

    @method(1)
    async def ask(self) -> None: ...

    return type("Odd", (StandardHandler,), {"REQUEST": 0x0140, "ask": ask, **attributes})


def test_an_enum_is_as_wide_as_its_members():
    (one,) = model_of(typed(Large=Large)).enums
    assert (one.bits, one.signed, one.flags) == (64, False, True)


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"VERIFY_VALUE1": 5}, "odd: VERIFY_VALUE1 is stamped over what its typed methods answer"),
        ({"VERIFY_VALUE2": 5}, "odd: VERIFY_VALUE2 is stamped over what its typed methods answer"),
        ({"Huge": Huge}, "odd: the members of Huge do not fit into 64 bits"),
        ({"wait": BridgeResponse(1)}, "odd.ask: its `wait` is 0x1, which is no status"),
    ],
)
def test_what_a_guest_could_not_read_is_refused(attributes, problem):
    with pytest.raises(HandlerLoadError, match=problem):
        model_of(typed(**attributes))


def test_two_enums_with_one_name_are_refused():
    other = IntEnum("Large", {"ONE": 1})
    with pytest.raises(HandlerLoadError, match="odd: two enums of it are called Large; rename one"):
        model_of(typed(Large=Large, Other=other))


def test_two_handlers_with_one_name_or_one_request_are_refused():
    with pytest.raises(HandlerLoadError, match="two handlers are called keeper; give one another"):
        models_of([Keeper, type("Keeper", (Plain,), {})])
    with pytest.raises(
        HandlerLoadError, match="plain and waits both answer request 0x0131; give one another"
    ):
        models_of([Plain, Waits])
    assert len(models_of([Keeper, Plain])) == 2
