"""Objects that no answer should consist of: each raises or lies when it is asked for something."""

import enum

import msgspec


class Abort(BaseException):
    """One of a user's own, which no `except Exception` takes."""


class Lazy:
    """As an object of a database whose session has ended."""

    def __init__(self, error=RuntimeError):
        self.error = error

    def __repr__(self):
        raise self.error("the session is closed")

    __str__ = __format__ = __repr__


class Pretender:
    """Poses as an int, until it is asked twice."""

    @property
    def __class__(self):
        raise RuntimeError("no class")


class PosesAsInt:
    __class__ = int


class Subclassed(str):
    __slots__ = ()

    def isprintable(self):
        raise RuntimeError

    def encode(self, *arguments):
        raise RuntimeError

    def __len__(self):
        raise RuntimeError


class OddText:
    """Its `repr` is of a subclass, or no text that UTF-8 can hold."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


class _NoName(type):
    @property
    def __name__(cls):
        raise RuntimeError("no name")


class Nameless(metaclass=_NoName):
    def __repr__(self):
        raise RuntimeError


class Fields(msgspec.Struct):
    inner: object


class Level(enum.IntEnum):
    HIGH = 3


class Flags(enum.IntFlag):
    ONE = 1


class Whole:
    def __init__(self, number):
        self.number = number

    def __index__(self):
        if isinstance(self.number, type):
            raise self.number
        return self.number


def _itself():
    ring = []
    ring.append(ring)
    return ring


def _deep(depth=100_000):
    inner = None
    for _ in range(depth):
        inner = [inner]
    return inner


OUTPUTS = {
    "a repr that raises": Lazy(),
    "a repr that raises what is no Exception": Lazy(Abort),
    "a repr that exits": Lazy(SystemExit),
    "no class": Pretender(),
    "poses as an int": PosesAsInt(),
    "a repr of a subclass": OddText(Subclassed("text")),
    "a repr of surrogates": OddText("\ud800\n\x1b[2J"),
    "a repr that is no text": OddText(5),
    "a type without a name": Nameless(),
    "surrogates": "\udcff\u202e\u2028\x9b",
    "itself": _itself(),
    "deep": _deep(),
    "a number of 5,000 digits": 10**5000,
    "a number of 70 bits": 1 << 70,
    "no number": float("nan"),
    "raw bytes that are no JSON": msgspec.Raw(b'{"\n'),
    "raw bytes of two lines": [msgspec.Raw(b"[1,\n2]")],
    "raw bytes that are no text": msgspec.Raw(b'"\xff"'),
    "no raw bytes": {"a": msgspec.Raw(b"")},
    "a field that raises": Fields(Lazy()),
    "a key that JSON cannot hold": {Level: 1, (1, 2): 3},
    "large": "x" * 1_000_000,
    "bytes": b"\xff\0",
    "an error": ZeroDivisionError("1 / 0"),
    "a class": Lazy,
}
"""What handlers may give with `with_output`, by what is odd about it."""

NO_VALUES = {
    "0.0": 0.0,
    "1.0": 1.0,
    "nan": float("nan"),
    "text": "5",
    "no text": "",
    "bytes": b"\1",
    "no bytes": b"",
    "list": [],
    "dict": {},
    "tuple": (),
    "complex": 1j,
    "object": object(),
    "class": int,
    "raises": Lazy(),
    "no class": Pretender(),
    "poses as an int": PosesAsInt(),
    "an index that raises": Whole(ZeroDivisionError),
    "an index that is none": Whole("5"),
    "nameless": Nameless(),
}
"""What is no value of a response."""
