"""What a setting may be: its unit, its bounds and its meaning, declared once, as its annotation.

    class Limits(msgspec.Struct, frozen=True):
        keep: Annotated[Seconds, Meta(description="how long a VM is remembered")] = 300.0

        def __post_init__(self) -> None:
            check_fields(self)

msgspec checks types and bounds where a struct is decoded, and not where it is made in Python: there
`check_fields` does. The TOML file, the command line and the tests of the documentation read the
same annotations with `declared` and `problem`, so a bound has one message wherever it is broken.

| in `Meta` | is |
|---|---|
| `gt`, `ge`, `lt`, `le`, `multiple_of`, `min_length` | the bounds, as msgspec checks them |
| `description` | what the setting means, without unit, bounds and default |
| `extra["unit"]` | what a number counts |
| `extra["words"]` | the bounds in words, where the numbers alone would not be understood |
| `extra["format"]` | how a wrong number is shown |

Bounds of one part of a union are annotated at that part: `Seconds | None`.
"""

import sys
from collections.abc import Collection, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from vmibridge.text import type_name

__all__ = [
    "Count",
    "Declared",
    "Seconds",
    "Value",
    "check",
    "check_fields",
    "declared",
    "options",
    "plain_type",
    "problem",
    "problem_of",
]

Seconds: TypeAlias = Annotated[float, Meta(gt=0, extra={"unit": "seconds"})]
Count: TypeAlias = Annotated[int, Meta(ge=1)]
Value: TypeAlias = Annotated[int, Meta(ge=1, le=4)]
"""The number of one of value1 to value4."""


_LARGEST = int(sys.float_info.max)
_NAMES: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    NoneType: "None",
}


class Declared(NamedTuple):
    """What the annotation of a setting says."""

    description: str
    unit: str
    bounds: str
    """In words, such as "above 0"; empty: there are none."""


def declared(struct: type[msgspec.Struct], name: str) -> Declared:
    """What is declared of a field. Raises `KeyError`."""
    kind = _kinds(struct)[name]
    description = next((meta.description for meta in _metas(kind) if meta.description), "")
    metas = [meta for option in options(kind) for meta in _metas(option)]
    units = [meta.extra["unit"] for meta in metas if meta.extra and "unit" in meta.extra]
    return Declared(description, units[-1] if units else "", _words(metas))


def check_fields(struct: msgspec.Struct) -> None:
    """Raise `ValueError` for the first field that is out of bounds, `TypeError` for one of another
    type; for `__post_init__`."""
    kinds = _kinds(type(struct))
    for name in struct.__struct_fields__:
        check(name, getattr(struct, name), kinds[name])


def check(name: str, value: object, kind: Any) -> None:
    """Raise `ValueError` for a value that is out of the bounds that the type `kind` declares.

    Raises `TypeError` for one of another type: it would end a run where it is used first.
    """
    if not _is_of(value, kind):
        names = " or ".join(_name(option) for option in options(kind))
        raise TypeError(f"{name} is {names}, not of type {type_name(value)}")
    why = problem(value, kind)
    if why is not None:
        raise ValueError(f"{name} {why}")


def problem(value: object, kind: Any) -> str | None:
    """Why a value is out of the bounds that `kind` declares, to be read behind its name; else
    `None`. Whether it is of the right type is not tested."""
    return _problem(value, kind, "must")


def problem_of(struct: type[msgspec.Struct], name: str, value: object) -> str | None:
    """The same of a field. Raises `KeyError`."""
    return problem(value, _kinds(struct)[name])


def _problem(value: object, kind: Any, must: str) -> str | None:
    for option in options(kind):
        metas, plain = _metas(option), plain_type(option)
        if plain in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, int) and abs(value) > _LARGEST:
                return f"{must} be a number that is not far too large"
            return _problem_of_number(value, metas, must)
        if get_origin(plain) in (tuple, frozenset, list) and isinstance(value, Collection):
            least = max((meta.min_length or 0 for meta in metas), default=0)
            if len(value) < least:
                return f"{must} have {least} or more, got {len(value)}"
            found = (_problem(item, get_args(plain)[0], f"{must} each") for item in value)
            return next((why for why in found if why is not None), None)
    return None


def _is_of(value: object, kind: Any) -> bool:
    return any(_is_plain(value, plain_type(option)) for option in options(kind))


def _is_plain(value: object, kind: Any) -> bool:
    if kind in (int, float):
        # As msgspec has it, a bool is no number.
        return isinstance(value, kind | int) and not isinstance(value, bool)
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (tuple, frozenset):
        # Of any kind: what is read of it are its items.
        return (
            isinstance(value, Collection)
            and not isinstance(value, str | bytes | Mapping)
            and all(_is_of(item, get_args(kind)[0]) for item in value)
        )
    return isinstance(value, origin or kind)


def _name(kind: Any) -> str:
    plain = plain_type(kind)
    origin = get_origin(plain)
    if origin is Literal:
        return " or ".join(map(repr, get_args(plain)))
    if origin in (tuple, frozenset):
        return f"a {origin.__name__}, each of them {_name(get_args(plain)[0])}"
    return _NAMES.get(plain) or f"a {(origin or plain).__name__}"


def _problem_of_number(value: float, metas: list[Meta], must: str) -> str | None:
    if all(_fits(value, meta) for meta in metas):
        return None
    extra = {name: said for meta in metas for name, said in (meta.extra or {}).items()}
    unit = f" {extra['unit']}" if "unit" in extra else ""
    shown = format(value, extra["format"]) if "format" in extra else repr(value)
    return f"{must} be {_words(metas)}{unit}, got {shown}"


def _fits(value: float, meta: Meta) -> bool:
    # In this form, since no comparison with a NaN is true.
    return (
        (meta.gt is None or value > meta.gt)
        and (meta.ge is None or value >= meta.ge)
        and (meta.lt is None or value < meta.lt)
        and (meta.le is None or value <= meta.le)
        and (meta.multiple_of is None or value % meta.multiple_of == 0)
    )


def _words(metas: list[Meta]) -> str:
    words: list[str] = []
    for meta in metas:
        if meta.extra and "words" in meta.extra:
            return str(meta.extra["words"])
        if meta.gt is not None:
            words.append(f"above {meta.gt}")
        if meta.ge is not None and meta.le is not None:
            words.append(f"{meta.ge} to {meta.le}")
        elif meta.ge is not None:
            words.append(f"{meta.ge} or more")
        elif meta.le is not None:
            words.append(f"at most {meta.le}")
        if meta.lt is not None:
            words.append(f"below {meta.lt}")
        if meta.multiple_of is not None:
            words.append(f"a multiple of {meta.multiple_of}")
        if meta.min_length is not None:
            words.append(f"at least {meta.min_length}")
    return ", ".join(words)


@cache
def _kinds(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def options(kind: Any) -> list[Any]:
    """The parts of a union, each with what is declared of it; else the type itself."""
    plain = plain_type(kind)
    if get_origin(plain) in (Union, UnionType):
        return [option for part in get_args(plain) for option in options(part)]
    return [kind]


def plain_type(kind: Any) -> Any:
    """The type without what is declared of it."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _metas(kind: Any) -> list[Meta]:
    if get_origin(kind) is not Annotated:
        return []
    return [meta for meta in get_args(kind)[1:] if isinstance(meta, Meta)]
