"""The options behind a spec or a URL: `width=64&memory=16MiB`, checked and decoded.

One place, so that the same mistake gives the same message everywhere. Each message begins with
the spec as its caller wants it shown.
"""

from collections.abc import Collection, Iterator, Mapping
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


def read_options(
    spec: str,
    options: str,
    known: Collection[str],
    lists: Collection[str] = (),
    *,
    secret: bool = False,
) -> Iterator[tuple[str, str]]:
    """Each option of `options`, name and value as text, in their order.

    Those in `lists` may be given again. With `secret` no message shows a value. Raises
    `BackendSpecError` for an option that is not in `known`, or is given twice.
    """
    try:
        pairs = parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options))
    except ValueError:
        told = "options are" if secret else f"{options!r} is not"
        raise BackendSpecError(f"{spec}: {told} OPTION=VALUE&OPTION=VALUE") from None
    seen: set[str] = set()
    for name, value in pairs:
        if name not in known:
            raise BackendSpecError(f"{spec}: no option {name!r}; there are {', '.join(known)}")
        if name in seen and name not in lists:
            raise BackendSpecError(f"{spec}: {name} is given twice")
        seen.add(name)
        yield name, value


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
    for name, value in read_options(spec, options, kind.__struct_encode_fields__, lists):
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
