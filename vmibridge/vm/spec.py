"""The options behind a spec or a URL: `width=64&memory=16MiB`, checked and decoded.

One place, so that the same mistake gives the same message everywhere. Each message begins with
the spec as its caller wants it shown.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec

from vmibridge.errors import BackendSpecError

S = TypeVar("S", bound=msgspec.Struct)

_NEVER = re.compile("[\0\ud800-\udfff]")
_MODE = re.compile("0o[0-7]{1,3}")
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s|)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}
_UNIT = re.compile("([KMG])(?:iB)?$")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes, in decimal or hex, with K, M or G, or KiB, MiB or GiB behind, in units of 1024.

    Raises `ValueError`.
    """
    unit = _UNIT.search(text)
    return int(text, 0) if unit is None else int(text[: unit.start()], 0) * _UNITS[unit[1]]


def parse_duration(text: str) -> float:
    """Seconds, in decimal, with us, ms or s behind, or without. Raises `ValueError`."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no duration")
    return float(match[1]) * _SECONDS[match[2]]


def parse_mode(spec: str, text: str) -> int:
    """The mode of a socket's file, as in 0o600. Raises `BackendSpecError` for another form: 600 is
    no octal number in Python, and octal in chmod."""
    if not _MODE.fullmatch(text):
        hint = f"0o{text}" if re.fullmatch("[0-7]{3}", text) else "0o600"
        raise BackendSpecError(f"{spec}: mode={text} is not the mode of a file, such as {hint}")
    return int(text, 8)


def check_text(spec: str, what: str = "") -> None:
    """Raises `BackendSpecError` for text with a NUL, or from bytes that are not UTF-8.

    No file, socket or host has such a name, and each library fails at it in a way of its own.
    `what` is the text; by default `spec` itself.
    """
    if _NEVER.search(what or spec):
        raise BackendSpecError(f"{spec}: has a NUL, or bytes that are not UTF-8")


def port_number(text: str) -> int:
    """A port in decimal digits; -1 if it is none."""
    # Not by `int` alone: Python refuses numbers of more than 4,300 digits with `ValueError`.
    if not text.isascii() or not text.isdigit() or len(text.lstrip("0")) > len("65535"):
        return -1
    port = int(text[-len("65535") :])
    return port if port <= 0xFFFF else -1


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
    `BackendSpecError` for an option that is not in `known`, or is given twice, and for bytes
    that are not UTF-8.
    """
    try:
        pairs = parse_qsl(
            options, keep_blank_values=True, strict_parsing=bool(options), errors="strict"
        )
    except UnicodeDecodeError:
        raise BackendSpecError(f"{spec}: an option has bytes that are not UTF-8") from None
    except ValueError:
        what = "options are" if secret else f"{options!r} is not"
        raise BackendSpecError(f"{spec}: {what} OPTION=VALUE&OPTION=VALUE") from None
    seen: set[str] = set()
    for name, value in pairs:
        if name not in known:
            raise BackendSpecError(f"{spec}: no option {name!r}; there are {', '.join(known)}")
        if name in seen and name not in lists:
            raise BackendSpecError(f"{spec}: {name} is given twice")
        seen.add(name)
        check_text(f"{spec}: {name}", value)
        yield name, value


def parse_options(
    spec: str,
    options: str,
    kind: type[S],
    numbers: Mapping[str, str],
    lists: Collection[str] = (),
    durations: Collection[str] = (),
) -> S:
    """Decode `options` into `kind`; `numbers` names the options that are integers, `durations`
    those that are seconds. One named `mode` is the mode of a file.

    Those in `lists` may be given again. Raises `BackendSpecError` for an option that is
    unknown, given twice, or wrong.
    """
    values: dict[str, str | float | list[str | float]] = {}
    texts: dict[str, str] = {}
    for name, value in read_options(spec, options, kind.__struct_encode_fields__, lists):
        parsed: str | float = value
        try:
            if name == "mode":
                parsed = parse_mode(spec, value)
            elif name in numbers:
                parsed = parse_size(value)
            elif name in durations:
                parsed = parse_duration(value)
        except ValueError as error:
            if isinstance(error, BackendSpecError):
                raise
            types = {each.encode_name: each.type for each in msgspec.structs.fields(kind)}
            wanted = numbers.get(name) or _wanted_duration(types[name])
            raise BackendSpecError(f"{spec}: {name}={value} is not {wanted}") from None
        if name in lists:
            several = values.setdefault(name, [])
            assert isinstance(several, list)
            several.append(parsed)
        else:
            values[name], texts[name] = parsed, value
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BackendSpecError(f"{spec}: {_why(values, texts, kind, durations) or error}") from None


def _why(
    values: Mapping[str, object],
    texts: Mapping[str, str],
    kind: type[msgspec.Struct],
    durations: Collection[str],
) -> str | None:
    """What is wrong with the values of options, in the words of those who write them; `texts` are
    those of options that are no lists."""
    fields = msgspec.structs.fields(kind)
    missing = [field.encode_name for field in fields if field.required]
    if missing and not values.keys() >= {*missing}:
        named = ", ".join(name for name in missing if name not in values)
        return (
            f"needs the options {'&'.join(f'{name}=...' for name in missing)}: no {named} is given"
        )
    for field in fields:
        name = field.encode_name
        try:
            msgspec.convert(values.get(name, field.default), field.type, strict=False)
        except msgspec.ValidationError:
            wanted = _wanted_duration if name in durations else _wanted
            return f"{name}={texts.get(name, values.get(name))} is not {wanted(field.type)}"
    return None


def _wanted_duration(kind: Any) -> str:
    """The same of a duration, whose type has both bounds."""
    (limits,) = get_args(kind)[1:]
    return f"a duration of {limits.ge:g} to {limits.le:g} s, in us, ms or s"


def _wanted(kind: Any) -> str:
    """What the value of an option may be, in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_wanted(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Annotated:
        plain, *metas = get_args(kind)
        least = next((meta.ge for meta in metas if meta.ge is not None), None)
        most = next((meta.le for meta in metas if meta.le is not None), None)
        if least is not None:
            return f"{_wanted(plain)}, {least} {'or more' if most is None else f'to {most}'}"
        return _wanted(plain)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _WANTED.get(kind, "such a value")
