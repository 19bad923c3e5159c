"""Options that are settings: a setting of a struct has its help, bounds and default from there."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec
from cyclopts import Parameter

from vmibridge.bridge.bounds import declared, problem_of
from vmibridge.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)


def setting(struct: type[msgspec.Struct], name: str, default: str | None = None) -> Parameter:
    """The option of a setting, which is `None` where it is not given.

    `default`: what holds then, where that is not the default of the struct.
    """
    said = declared(struct, name)
    about = said.description.replace("`", "")
    known = next(field.default for field in msgspec.structs.fields(struct) if field.name == name)
    shown = default or ("none" if known is None else f"{known:g}")
    return Parameter(
        help=f"{about[0].upper()}{about[1:]}. {said.unit.capitalize()}, {said.bounds}; {shown} by"
        " default."
    )


def with_options(
    settings: S, given: Mapping[str, object], called: Mapping[str, str] = MappingProxyType({})
) -> S:
    """A copy of `settings` with what options say, by the names of the fields; `None`: not given.

    `called`: options that are not called as their fields are.

    Raises `ConfigError` for a value that is out of bounds.
    """
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        why = problem_of(type(settings), name, value)
        if why is not None:
            raise ConfigError(f"--{called.get(name, name).replace('_', '-')}: {why}")
    return msgspec.structs.replace(settings, **said)
