"""The output of a handler as JSON, to be printed, recorded or exported.

An output is an object of other people. It may raise whenever it is asked for anything, contain
itself, be too large to tell, or pose as something else. None of that is raised here.
"""

import msgspec

from vmibridge.text import repr_of

__all__ = ["output_json", "output_text"]

_encode = msgspec.json.Encoder(enc_hook=repr_of).encode
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
"""Their JSON is what msgspec makes of it. Any other type may contain `msgspec.Raw`."""


def output_text(output: object) -> str:
    """The output as JSON, or its `repr` as a JSON string where JSON cannot hold it.

    It is text and no more: `msgspec.Raw` in an output is taken as it is.
    """
    try:
        return _encode(output).decode()
    except BaseException:  # whatever it raises is about this output alone
        return _encode(repr_of(output)).decode()


def output_json(output: object) -> bytes:
    """The same as one JSON value in one line."""
    data = output_text(output).encode()
    if type(output) in _PLAIN:
        return data
    try:
        msgspec.json.decode(data)
    except Exception:  # numbers of thousands of digits, too
        return _encode(repr_of(output))
    return _encode(repr_of(output)) if b"\n" in data or b"\r" in data else data
