"""What a handler gets from outside, in a form that can be recorded and given again.

- A value is given as a recording has it, recorded or not: so a handler sees the same in each run.
- A failure is an `OutsideError`, with the names of what was raised: then, and in a replay.
- Key, value and text have bounds, which hold in each run, too.
"""

import inspect
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any, Final, TypeAlias

import msgspec

from vmibridge.errors import OutsideError
from vmibridge.text import str_of

__all__ = [
    "MAX_KEY",
    "MAX_VALUE",
    "Fetch",
    "check_function",
    "check_key",
    "encoded",
    "fetched",
    "in_plain",
    "value_of",
]

MAX_KEY = 256
"""Characters."""
MAX_VALUE = 8 << 20
"""Bytes of a value, as MessagePack."""
_MAX_TEXT = 2000
"""Characters of what an exception says."""
_MAX_TYPES = 16
_MAX_NAME = 200

Fetch: TypeAlias = Callable[[], Awaitable[object]]
"""Gets something from outside."""

# They are what a recording gives, without being encoded and decoded.
_SAME: Final = frozenset((type(None), bool, float, bytes))
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_WRONG = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What an encoder or decoder raises for a value that it does not take."""


def check_key(key: object) -> None:
    """Raises `TypeError` and `ValueError` for what is no key."""
    if not isinstance(key, str):
        raise TypeError(f"the key of vmi.outside is a str, got {type(key).__name__}")
    if not 0 < len(key) <= MAX_KEY:
        raise ValueError(f"the key of vmi.outside has 1 to {MAX_KEY} characters, got {len(key)}")
    if not key.isascii():
        # As a recording is in UTF-8. Raises `UnicodeEncodeError`, which is a `ValueError`.
        key.encode()


def check_function(function: object) -> None:
    """Raises `TypeError` for what is known to be no async function before it is called.

    A coroutine that was given instead is closed, unless it has begun.
    """
    if not callable(function):
        if inspect.iscoroutine(function) and inspect.getcoroutinestate(function) == "CORO_CREATED":
            function.close()  # else Python would warn that it was never awaited
        raise TypeError(f"vmi.outside calls an async function, got {type(function).__name__}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError("vmi.outside calls an async function, got one that yields")


async def fetched(key: str, fetch: Fetch) -> object:
    """What the function gives. Raises `OutsideError` for an exception of it, whose cause it is."""
    try:
        awaitable = fetch()
        if type(awaitable) is not CoroutineType and not isinstance(awaitable, Awaitable):
            raise TypeError(
                "the function of vmi.outside has to be async; run one that blocks in a thread"
            )
        return await awaitable
    except Exception as error:
        raise OutsideError(key, _names(type(error)), str_of(error)[:_MAX_TEXT]) from error


def encoded(key: str, value: object) -> bytes:
    """A value as a recording has it. Raises `OutsideError` for one that it cannot have."""
    try:
        data = _encode(value)
    except _WRONG as error:
        raise _unfit(key, error, "its value cannot be recorded") from error
    if len(data) > MAX_VALUE:
        text = f"its value has {len(data)} bytes, {MAX_VALUE} is the most"
        raise OutsideError(key, _names(ValueError), text)
    return data


def value_of(key: str, data: bytes, kind: Any) -> Any:
    """The value, as the type `kind`; `None`: plain. Raises `OutsideError` for another one."""
    try:
        return _decode(data) if kind is None else msgspec.msgpack.decode(data, type=kind)
    except _WRONG as error:
        raise _unfit(key, error, "its value is not as the handler wants it") from error


def in_plain(key: str, value: object, kind: Any) -> Any:
    """A value that is not recorded, as a recording would give it. Raises `OutsideError`."""
    # Bytes near the limit are encoded, since that makes them a little longer.
    if (
        kind is None
        and type(value) in _SAME
        and not (type(value) is bytes and len(value) > MAX_VALUE // 2)
    ):
        return value
    return value_of(key, encoded(key, value), kind)


def _unfit(key: str, error: Exception, what: str) -> OutsideError:
    return OutsideError(key, _names(type(error)), f"{what}: {str_of(error)[:_MAX_TEXT]}")


def _names(kind: type) -> tuple[str, ...]:
    """Of a class and of those that it derives from."""
    classes = [each for each in kind.__mro__ if each not in (object, BaseException)]
    return tuple(_name(each) for each in classes[:_MAX_TYPES])


def _name(kind: type) -> str:
    module, name = str_of(kind.__module__), str_of(kind.__qualname__)
    return (name if module == "builtins" else f"{module}.{name}")[:_MAX_NAME]
