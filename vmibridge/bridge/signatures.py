"""From the signature of a method to what takes its words: once, when the class is made.

What cannot be served is refused there, by name: a type that is none of `bridge/parameters.py`, more
words than a request has, a parameter without a type.
"""

import enum
import typing
from collections.abc import Callable, Mapping
from inspect import Parameter as Declared
from inspect import isfunction, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Union

import msgspec

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.parameters import (
    GuestBytes,
    GuestInt,
    GuestRoom,
    GuestText,
    HostOutput,
    Parameter,
    Room,
    numbers_of,
    word_of,
)
from vmibridge.bridge.typed_method import TypedMethod

MAX_WORDS = 4
"""Of a request."""
_TYPE_OF: Mapping[type[msgspec.Struct], type] = {
    GuestInt: int,
    GuestText: str,
    GuestBytes: bytes,
    GuestRoom: Room,
}


def _is_plain(where: str, function: Callable[..., object]) -> bool:
    """Whether a method takes `(self, vmi, packet)`, and decodes its packet itself.

    Raises `TypeError` for what is nearly that: it would be called with the wrong things.
    """
    # Of what wraps it: that is what is called.
    declared = list(signature(function, follow_wrapped=False).parameters.values())
    hints = [each.annotation for each in declared[1:]]
    if hints and all(hint is Declared.empty for hint in hints):
        return True
    if not declared or (
        declared[0].name != "self" and declared[0].annotation is not Declared.empty
    ):
        raise TypeError(f"{where} takes no self")
    if [each.name for each in declared[1:]] == ["vmi", "packet"]:
        return not (typing.get_origin(hints[1]) is Annotated or hints[1] in _TYPE_OF.values())
    packets = [_is_packet(hint) for hint in hints]
    if any(packets) and packets != [False, True]:
        raise TypeError(f"{where}: write (self, vmi, packet), or parameters with types")
    return any(packets)


def _is_packet(hint: object) -> bool:
    # As a text, too: its name may be there for type checkers alone.
    return hint is BridgePacket or str(hint).rpartition(".")[2] == "BridgePacket"


def compile_method(cls: type, name: str, code: int) -> TypedMethod | None:
    """The typed method of a class with this name; `None`: it takes a packet.

    Raises `TypeError`, with the name of the parameter, for a signature that cannot be served.
    """
    function = getattr(cls, name)
    where = f"{cls.__name__}.{name}"
    if not isfunction(function) or _is_plain(where, function):
        return None
    try:
        hints = typing.get_type_hints(function, localns=dict(vars(cls)), include_extras=True)
    except Exception as error:
        # An annotation is any expression.
        raise TypeError(f"{where}: a type cannot be found: {error}") from error
    parameters: list[Parameter] = []
    context_at: int | None = None
    declared = list(signature(function, follow_wrapped=False).parameters.values())[1:]
    for place, each in enumerate(declared):
        if each.name not in hints:
            raise TypeError(
                f"{where} does not take what it is given: {each.name} has no type; write"
                " (self, vmi, packet), or parameters with types"
            )
        if each.kind is Declared.KEYWORD_ONLY:
            raise TypeError(f"{where}: {each.name} is for keywords alone, which no guest has")
        if each.kind is not Declared.POSITIONAL_OR_KEYWORD or each.default is not Declared.empty:
            raise TypeError(f"{where}: a guest gives all words: {each} may be left out")
        if hints[each.name] is BridgeContext:
            if context_at is not None:
                raise TypeError(f"{where}: {each.name} is a second BridgeContext")
            context_at = place
        else:
            parameters.append(_parameter(where, each.name, hints[each.name]))
    words = sum(parameter.words for parameter in parameters)
    if words > MAX_WORDS:
        raise TypeError(
            f"{where} takes {words} words, a request has {MAX_WORDS}: two for bytes and for a"
            " room, one for all else"
        )
    is_for_host = _is_for_host(hints.get("return"))
    result = None if is_for_host else _result(where, hints)
    return TypedMethod(code, tuple(parameters), result, context_at, is_for_host=is_for_host)


def _is_for_host(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated and any(
        type(each) is HostOutput for each in typing.get_args(hint)[1:]
    )


def _result(where: str, hints: Mapping[str, Any]) -> Parameter | None:
    if "return" not in hints:
        raise TypeError(f"{where} does not say what it gives: '-> None', or '-> U32'")
    if hints["return"] is NoneType:
        return None
    result = _parameter(where, "what it gives", hints["return"], takes=_NUMBERS)
    if not isinstance(result.spec, GuestInt):
        raise TypeError(
            f"{where}: what it gives is a number or None, where it is no HostOutput; a Room takes"
            " more"
        )
    return result


_NUMBERS = "U8 to U64, I8 to I64, bool, an IntEnum, an IntFlag"
_TEXTS = (
    ", Annotated[str, GuestText(LIMIT)], Annotated[bytes, GuestBytes(LIMIT)],"
    " Annotated[Room, GuestRoom(LIMIT)]"
)


def _parameter(where: str, name: str, hint: Any, takes: str = _NUMBERS + _TEXTS) -> Parameter:
    optional = False
    if typing.get_origin(hint) in (Union, UnionType):
        inner = [each for each in typing.get_args(hint) if each is not NoneType]
        optional = len(inner) == 1 and len(typing.get_args(hint)) == 2
        if optional:
            hint = inner[0]
    try:
        found = _plain_parameter(name, hint)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if found is None:
        shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise TypeError(f"{where}: {name} is of type {shown}, not one of: {takes}")
    if optional:
        if isinstance(found.spec, GuestInt):
            raise TypeError(f"{where}: {name} is a number, which cannot be None")
        return msgspec.structs.replace(found, optional=True)
    return found


def _plain_parameter(name: str, hint: Any) -> Parameter | None:
    if typing.get_origin(hint) is Annotated:
        kind, *extras = typing.get_args(hint)
        specs = [each for each in extras if type(each) in _TYPE_OF]
        if not specs:
            return _plain_parameter(name, kind)
        if len(specs) > 1:
            return None
        spec = specs[0]
        if (
            isinstance(spec, GuestInt)
            and isinstance(kind, type)
            and issubclass(kind, enum.IntEnum | enum.IntFlag)
        ):
            return _members(name, kind, spec)
        return Parameter(name, spec) if kind is _TYPE_OF[type(spec)] else None
    if hint is bool:
        return Parameter(name, GuestInt(8), bool)
    if hint is int:
        return Parameter(name, GuestInt(64))
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum | enum.IntFlag):
        return _members(name, hint, None)
    return None


def _members(
    name: str, kind: type[enum.IntEnum] | type[enum.IntFlag], spec: GuestInt | None
) -> Parameter:
    values = numbers_of(kind)
    if not values:
        raise ValueError(f"{name} is of type {kind.__name__}, which has no member")
    if issubclass(kind, enum.IntFlag) and min(values) < 0:
        raise ValueError(f"{name} is of type {kind.__name__}, which has a negative member")
    if spec is None:
        # What a C compiler takes for an enum, where it is enough.
        signed = any(value < 0 for value in values)
        fits = all(-(1 << 31) <= value < 1 << (32 - signed) for value in values)
        spec = GuestInt(32 if fits else 64, signed=signed)
    parameter = Parameter(name, spec, kind)
    for value in values:
        word_of(parameter, value)
    return parameter
