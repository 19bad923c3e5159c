"""What came from outside by `vmi.outside`, as text: of a recording, which may say anything."""

import math
from collections.abc import Iterable

import msgspec

from vmibridge.recording.messages import Outside

__all__ = ["outside_json", "outside_line", "plain"]

_MAX_DEPTH = 32
_MAX_SHOWN = 200
"""Characters of a value in a line."""


def outside_line(call: Outside) -> str:
    """One call, in one line."""
    number = f" #{call.number}" if call.number else ""
    if call.left_out:
        what = "left out"
    elif call.error is not None:
        what = f"failed: {call.types[0] if call.types else 'error'}: {call.error}"
    elif call.data is None:
        what = "cut off"
    else:
        what = msgspec.json.encode(plain(call.data)).decode()
    shown = what if len(what) <= _MAX_SHOWN else f"{what[:_MAX_SHOWN]}..."
    return f"{call.key[:_MAX_SHOWN]!a}{number}: {shown}"


def outside_json(calls: Iterable[Outside]) -> str | None:
    """All calls of a trap as JSON, an array of objects; `None`: there are none."""
    told = [
        {
            "key": call.key,
            "number": call.number,
            **({} if call.data is None else {"value": plain(call.data)}),
            **({} if call.error is None else {"error": call.error, "types": call.types}),
        }
        for call in calls
    ]
    return msgspec.json.encode(told).decode() if told else None


def plain(data: bytes) -> object:
    """The value, as JSON has it: bytes in hex, and text for numbers that it has no word for. What
    is no MessagePack is given in hex, whole."""
    try:
        return _plain(msgspec.msgpack.decode(data), _MAX_DEPTH)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return data.hex()


def _plain(value: object, depth: int) -> object:
    if not depth:
        return "..."
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case bytes():
            return value.hex()
        case list():
            return [_plain(each, depth - 1) for each in value]
        case dict():
            return {
                name if isinstance(name, str) else repr(name): _plain(each, depth - 1)
                for name, each in value.items()
            }
        case None | bool() | int() | float() | str():
            return value
        case _:  # an extension of MessagePack, such as a time
            return repr(value)
