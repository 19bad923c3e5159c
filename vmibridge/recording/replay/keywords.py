"""The keywords of a replay in a program, checked before anything is opened.

They come of a mark of pytest, too: so what is wrong with one is a `ConfigError` of one line, which
names it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from vmibridge.bridge.bounds import problem_of
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError
from vmibridge.recording.replay.own_loop import LoopName
from vmibridge.text import repr_of, type_name

__all__ = ["Order", "check_keywords", "check_settings", "is_name"]

Order: TypeAlias = Literal["recorded", "vcpu"]
_MAX_NAME = 64
"""Characters of the name of a VM."""


class _Keywords(msgspec.Struct, frozen=True):
    """Their types. What may be given several times is a tuple here."""

    requests: tuple[int | str, ...]
    methods: tuple[int | str, ...]
    outcomes: tuple[str, ...]
    vms: tuple[str, ...]
    vcpus: tuple[int, ...]
    ignore: tuple[str, ...]
    first: int | None
    last: int | None
    since: int | float | str | None
    until: int | float | str | None
    strict: bool
    speed: int | float
    accept: bool
    rename: dict[str, str] | None


_LISTS = frozenset(("requests", "methods", "outcomes", "vms", "vcpus", "ignore"))
_CHOICES: Mapping[str, Any] = {"order": Order, "loop": LoopName | None}


def check_keywords(given: Mapping[str, object]) -> dict[str, Any]:
    """The same, with a tuple for what may be several. Raises `ConfigError`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in _CHOICES:
            found[name] = _chosen(name, value)
            continue
        if name in _LISTS:
            value = _several(name, value)
        found[name] = _converted(_Keywords, name, value)
    for name in ("first", "last"):
        number = found[name]
        if number is not None and number < 0:
            raise ConfigError(f"{name} is the number of a trap, from 0, not {number}")
    if not found["speed"] >= 0:
        raise ConfigError(f"speed is a number from 0, not {found['speed']}")
    for old, new in (found["rename"] or {}).items():
        if not (old and is_name(new)):
            raise ConfigError(f"rename: {old!r} to {new!r}: is not two names of a VM")
    return found


def check_settings(given: Mapping[str, object]) -> None:
    """Raise `ConfigError` for a value that is none of a setting, or out of its bounds."""
    for name, value in given.items():
        why = problem_of(ServerSettings, name, value)
        if why is not None:
            raise ConfigError(f"{name} {why}")
        _converted(ServerSettings, name, value)


def is_name(name: str) -> bool:
    """Whether a VM may be called so."""
    return 0 < len(name) <= _MAX_NAME and name.isprintable()


def _several(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, int | str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} is one or several, not {type_name(value)}")
    return tuple(value)


def _chosen(name: str, value: object) -> object:
    kind = _CHOICES[name]
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        words = [str(word) for part in (kind, *get_args(kind)) for word in get_args(part)]
        there = " or ".join(word for word in words if word.isalpha())
        raise ConfigError(f"{name} is {there}, not {repr_of(value)}") from None


def _struct_of(name: str) -> str:
    """What is no number and no text: what msgspec calls an object."""
    return {"rename": "dict", "policy": "Policy"}.get(name, "BridgeResponse")


def _converted(struct: type[msgspec.Struct], name: str, value: object) -> Any:
    kind = next(field.type for field in msgspec.structs.fields(struct) if field.name == name)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, _ = str(error).partition(" - at ")
        for word, here in (("null", "None"), ("array", "tuple"), ("object", _struct_of(name))):
            what = re.sub(rf"\b{word}\b", here, what)
        raise ConfigError(f"{name}: {what[:1].lower()}{what[1:]}") from None
