"""What a guest needs to know of handlers, in no language: the input of every emitter.

| struct | of |
|---|---|
| `HandlerModel` | one handler: its contract, its methods, its enums and constants |
| `MethodModel` | one method: typed, or with four values as they are |
| `ParameterModel` | one parameter of a typed method, or what it gives |
| `EnumModel` | an `IntEnum` or `IntFlag`: of a parameter, or in the class of the handler |

Invariants:

- It is made of classes, without making a handler, and holds nothing of where they are: no path, no
  module, no time. The same classes give the same model.
- Order is that of the codes for methods, and that of the classes for all else.
- Names are as Python has them. What a language takes for an identifier is for its emitter to say.
"""

import enum
from collections.abc import Iterable
from inspect import cleandoc, getdoc, getmodule
from typing import Any, Literal, TypeAlias

import msgspec

from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_WAIT
from vmibridge.bridge.handler import BridgeHandler, Method, contract_of
from vmibridge.bridge.parameters import GuestBytes, GuestInt, GuestRoom, GuestText, Parameter
from vmibridge.bridge.response import BridgeResponse
from vmibridge.bridge.status import Status, StatusKind
from vmibridge.errors import HandlerLoadError
from vmibridge.text import printable

__all__ = ["EnumModel", "HandlerModel", "MethodModel", "ParameterModel", "model_of", "models_of"]

Kind: TypeAlias = Literal["number", "bool", "enum", "text", "bytes", "room"]


class EnumModel(msgspec.Struct, frozen=True):
    """An enum of whole numbers."""

    name: str
    flags: bool
    """Whether members may be combined: an `IntFlag`."""
    bits: int
    """32, or 64 where that does not hold every member."""
    signed: bool
    members: dict[str, int]
    """By name, aliases too, in their order."""
    doc: str = ""


class ParameterModel(msgspec.Struct, frozen=True):
    """One parameter, or what a method gives."""

    name: str
    """Empty for what a method gives."""
    kind: Kind
    words: int
    """1, or 2: an address, and a length or a capacity in bytes."""
    bits: int = 64
    """Of a number, a bool or an enum."""
    signed: bool = False
    enum: str | None = None
    """The name of the enum."""
    limit: int | None = None
    """Bytes, at the most: of text without its NUL, of bytes, of a room."""
    encoding: Literal["utf-8", "utf-16-le"] | None = None
    """Of text."""
    optional: bool = False
    """Address 0 stands for none."""


class MethodModel(msgspec.Struct, frozen=True):
    """One method."""

    name: str
    code: int | None
    """16 bits; `None`: the handler takes any code."""
    typed: bool
    """Whether it has parameters; if not, it takes and gives four values as they are."""
    parameters: tuple[ParameterModel, ...] = ()
    result: ParameterModel | None = None
    wait: int | None = None
    """value1 of an answer that tells to wait; `None`: it never does. For a typed method it is a
    status of this kind, whatever its other fields."""
    doc: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether a word of 32 bits may be too short for one of its numbers."""
        numbers = [*self.parameters, *([self.result] if self.result else [])]
        return any(each.kind in ("number", "enum") and each.bits == 64 for each in numbers)

    @property
    def words(self) -> int:
        """0 to 4."""
        return sum(parameter.words for parameter in self.parameters)


class HandlerModel(msgspec.Struct, frozen=True):
    """One handler."""

    name: str
    request: int
    magic: int
    """32 bits; that of the standard contract where the handler takes any."""
    stamps: tuple[int | None, int | None, int | None, int | None]
    """What is in value1 to value4 of each of its answers; `None`: anything."""
    methods: tuple[MethodModel, ...]
    enums: tuple[EnumModel, ...] = ()
    constants: dict[str, int] = {}
    """The upper-case whole numbers of the class."""
    doc: str = ""


_WAITING = Status(kind=StatusKind.WAITING).encode()
_CONTRACT = {name for name in vars(BridgeHandler) if name.isupper()} | {
    name for name in BridgeHandler.__annotations__ if name.isupper()
}


def models_of(
    handlers: Iterable[BridgeHandler[Any] | type[BridgeHandler[Any]]],
) -> tuple[HandlerModel, ...]:
    """The models of several handlers for one file.

    Raises `HandlerLoadError` for two of one name or one request, and as `model_of` does.
    """
    found: list[HandlerModel] = []
    for handler in handlers:
        made = model_of(handler)
        for other in found:
            if other.name == made.name:
                raise HandlerLoadError(
                    f"two handlers are called {printable(made.name)}; give one another `name`, or"
                    " name its source in a call of its own"
                )
            if (other.request, other.magic) == (made.request, made.magic):
                raise HandlerLoadError(
                    f"{printable(other.name)} and {printable(made.name)} both answer request"
                    f" {made.request:#06x}; give one another REQUEST"
                )
        found.append(made)
    return tuple(found)


def model_of(handler: BridgeHandler[Any] | type[BridgeHandler[Any]]) -> HandlerModel:
    """The model of one handler.

    Raises `HandlerLoadError` for one whose answers a guest could not read.
    """
    kind = handler if isinstance(handler, type) else type(handler)
    contract = contract_of(handler)
    if any(method.typed is not None for method in kind.methods.values()):
        for slot in (1, 2):
            if contract.verify_values[slot - 1] is not None:
                raise HandlerLoadError(
                    f"{printable(handler.name)}: VERIFY_VALUE{slot} is stamped over what its typed"
                    " methods answer; remove it"
                )
    methods = [_method(handler, kind, each) for _, each in sorted(kind.methods.items())]
    if not methods:
        wait = _wait(handler, None)
        methods = [MethodModel("", None, typed=False, wait=wait, doc=_doc(kind.handle))]
    docs = [_doc(kind)]
    if not all(method.typed for method in methods):
        # What the four values are stands in the table of the module.
        docs.append(_doc(getmodule(kind)))
    return HandlerModel(
        name=handler.name,
        request=contract.request,
        magic=STANDARD_MAGIC if contract.magic is None else contract.magic,
        stamps=contract.verify_values,
        methods=tuple(methods),
        enums=_enums(kind),
        constants={
            name: int(value)
            for base in reversed(kind.__mro__)
            for name, value in vars(base).items()
            if name.isupper()
            and not name.startswith("_")
            and name not in _CONTRACT
            and type(value) is int
            and -(1 << 63) <= value < 1 << 64
        },
        doc="\n\n".join(doc for doc in docs if doc),
    )


def _doc(what: object) -> str:
    return (getdoc(what) or "").strip()


def _method(
    handler: BridgeHandler[Any] | type[BridgeHandler[Any]],
    kind: type[BridgeHandler[Any]],
    method: Method,
) -> MethodModel:
    wait = _wait(handler, method)
    doc = _doc(getattr(kind, method.name))
    typed = method.typed
    if typed is None:
        return MethodModel(method.name, method.code, typed=False, wait=wait, doc=doc)
    if wait is not None and wait & 0xFF00 != _WAITING:
        raise HandlerLoadError(
            f"{printable(handler.name)}.{method.name}: its `wait` is {wait:#x}, which is no status"
            " that tells to wait; derive from StandardHandler, which has one"
        )
    return MethodModel(
        method.name,
        method.code,
        typed=True,
        parameters=tuple(_parameter(each, each.name) for each in typed.parameters),
        result=None if typed.result is None else _parameter(typed.result, ""),
        wait=_WAITING,
        doc=doc,
    )


def _wait(
    handler: BridgeHandler[Any] | type[BridgeHandler[Any]], method: Method | None
) -> int | None:
    """value1 of an answer that tells to wait, as the server works it out."""
    wait: BridgeResponse[Any] | None = None
    may_wait: bool | None = None
    for place in (handler, method):
        if place is not None:
            may_wait = place.may_wait if place.may_wait is not None else may_wait
            may_wait = may_wait or place.soft_timeout is not None
            wait = wait if place.wait is None else place.wait
    if not may_wait and wait is None:
        return None
    stamp = contract_of(handler).verify_value1
    value = (wait or STANDARD_WAIT).value1 if stamp is None else stamp
    return value


def _parameter(parameter: Parameter, name: str) -> ParameterModel:
    spec, members = parameter.spec, parameter.members
    if isinstance(spec, GuestInt):
        kind: Kind = "number" if members is None else "bool" if members is bool else "enum"
        return ParameterModel(
            name,
            kind,
            parameter.words,
            spec.bits,
            spec.signed,
            enum=members.__name__ if members is not None and kind == "enum" else None,
        )
    kinds: dict[type[msgspec.Struct], Kind] = {
        GuestText: "text",
        GuestBytes: "bytes",
        GuestRoom: "room",
    }
    return ParameterModel(
        name,
        kinds[type(spec)],
        parameter.words,
        limit=spec.limit,
        encoding=spec.encoding if isinstance(spec, GuestText) else None,
        optional=parameter.optional,
    )


def _enums(kind: type[BridgeHandler[Any]]) -> tuple[EnumModel, ...]:
    """Those that its methods take and give, and those that stand in the class, each once."""
    found: dict[str, type[enum.IntEnum | enum.IntFlag]] = {}

    def add(one: type[enum.IntEnum | enum.IntFlag]) -> None:
        if found.setdefault(one.__name__, one) is not one:
            raise HandlerLoadError(
                f"{printable(kind.name)}: two enums of it are called {one.__name__}; rename one"
            )

    for _, method in sorted(kind.methods.items()):
        if method.typed is not None:
            for each in (*method.typed.parameters, method.typed.result):
                if each is not None and each.members is not None and each.members is not bool:
                    add(each.members)
    for base in reversed(kind.__mro__):
        for value in vars(base).values():
            is_enum = isinstance(value, type) and issubclass(value, enum.IntEnum | enum.IntFlag)
            if is_enum and len(value.__members__):
                add(value)
    return tuple(_enum(kind, one) for one in found.values())


def _enum(kind: type[BridgeHandler[Any]], one: type[enum.IntEnum | enum.IntFlag]) -> EnumModel:
    members = {name: int(member) for name, member in one.__members__.items()}
    signed = any(value < 0 for value in members.values())
    for bits in (32, 64):
        low, high = -(1 << bits - 1) if signed else 0, 1 << bits - signed
        if all(low <= value < high for value in members.values()):
            # Of the class itself: one without is given that of `int`.
            doc = cleandoc(vars(one).get("__doc__") or "").strip()
            return EnumModel(
                one.__name__,
                issubclass(one, enum.IntFlag),
                bits,
                signed,
                members,
                "" if doc == "An enumeration." else doc,
            )
    raise HandlerLoadError(
        f"{printable(kind.name)}: the members of {one.__name__} do not fit into 64 bits"
    )
