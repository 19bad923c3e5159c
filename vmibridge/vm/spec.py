"""The options of a backend spec: `width=64&memory=16MiB`, decoded by msgspec."""

from collections.abc import Collection, Mapping
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec

from vmibridge.errors import BackendSpecError

S = TypeVar("S", bound=msgspec.Struct)

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes, in decimal or hex, with KiB, MiB or GiB behind. Raises `ValueError`."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit), 0) * factor
    return int(text, 0)


def parse_options(
    spec: str,
    options: str,
    kind: type[S],
    numbers: Mapping[str, str],
    lists: Collection[str] = (),
) -> S:
    """Decode `options` into `kind`; `numbers` names the options that are integers.

    Those in `lists` may be given again. Raises `BackendSpecError` for an option that is
    unknown, given twice, or wrong.
    """
    values: dict[str, str | int | list[str | int]] = {}
    try:
        pairs = parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options))
    except ValueError:
        raise BackendSpecError(f"{spec}: {options!r} is not OPTION=VALUE&OPTION=VALUE") from None
    for name, value in pairs:
        if name not in kind.__struct_encode_fields__:
            known = ", ".join(kind.__struct_encode_fields__)
            raise BackendSpecError(f"{spec}: no option {name!r}; there are {known}")
        if name in values and name not in lists:
            raise BackendSpecError(f"{spec}: {name} is given twice")
        try:
            parsed = parse_size(value) if name in numbers else value
        except ValueError:
            raise BackendSpecError(f"{spec}: {name}={value} is not {numbers[name]}") from None
        if name in lists:
            several = values.setdefault(name, [])
            assert isinstance(several, list)
            several.append(parsed)
        else:
            values[name] = parsed
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BackendSpecError(f"{spec}: {error}") from None
