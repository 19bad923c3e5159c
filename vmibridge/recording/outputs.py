"""The typed output of a handler as text that two runs have in common, and where two differ.

The text is JSON. What differs from one process to the next is not in it: sets and dicts are in
the order of their members, and what JSON cannot hold is its `repr` without addresses and the
paths of modules. It may have any length, so a recording keeps its first `MAX_TEXT` characters,
and of a longer one a digest.

Whatever an output raises is about its text alone, and is not raised here.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import msgspec

from vmibridge.text import repr_of

__all__ = ["MAX_TEXT", "Leaf", "OutputText", "leaves_of", "output_text", "stable"]

MAX_TEXT = 4096
"""Characters of an output that a recording keeps."""
_MAX_PATHS = 64
_MAX_STEPS = 100_000
"""Values that are compared one by one; beyond it, two outputs differ as a whole."""
_MAX_MEMBERS = 4096
"""Of an array whose order may be another one."""

# What a quantifier may take is bounded: a text of megabytes is searched in one pass.
_LOADED = re.compile(
    r"vmibridge\.config\.loaded\.[^.\n]{0,1000}\.|vmibridge_handlers_h_[0-9a-f]{1,64}\."
)
"""The folder of a file of handlers, in the name of its module; the second form is of 0.1."""
_OBJECT = re.compile(r"<(?:[^<>\n]|<locals>){0,500}?\b(\w{1,100}) object at 0x[0-9a-f]+>")
_CLASS = re.compile(
    r"<(class|module) '(?:[^'\n]{0,500}[./])?([^'\n./]{1,100})'(?: from '[^'\n]{0,1000}')?>"
)
_BRACKETS = re.compile(r"<[^<>\n]{0,1000}>")
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
_LAST_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")

Path: TypeAlias = tuple[str | int, ...]
_Place: TypeAlias = tuple[Path, object, object]


class OutputText(NamedTuple):
    """The text of an output, as a recording has it."""

    text: str | None
    """Cut after `MAX_TEXT` characters, with `...` behind; `None` for no output."""
    digest: str | None
    """SHA-256 of the whole text, where it was cut."""

    @classmethod
    def of(cls, output: object) -> "OutputText":
        """That of an output."""
        text = output_text(output)
        if text is None or len(text) <= MAX_TEXT:
            return cls(text, None)
        return cls(f"{text[:MAX_TEXT]}...", hashlib.sha256(text.encode()).hexdigest())


def output_text(output: object) -> str | None:
    """The whole text; `None` for no output."""
    if output is None:
        return None
    try:
        return _encode(output).decode()
    except BaseException:  # keys that are no text, members without an order, what a hook raises
        try:
            return _encode(_ordered(output)).decode()
        except BaseException:  # whatever it raises is about this output alone
            return _encode(_hook(output)).decode()


def stable(text: str) -> str:
    """A `repr`, or a text that has one in it, without addresses and paths of modules."""
    text = _LOADED.sub("", text)
    if "<" not in text:
        return text
    text = _CLASS.sub(r"<\1 '\2'>", _OBJECT.sub(r"<\1 object at ...>", text))
    text = _BRACKETS.sub(lambda found: _ADDRESS.sub("at ...", found[0]), text)
    return _LAST_ADDRESS.sub(" at ...", text)


class Leaf(NamedTuple):
    """One place where two outputs differ."""

    path: str
    """As `.items[3].id`; `""`: they differ as a whole."""
    then: str
    """JSON; `""` where there is nothing."""
    now: str


def leaves_of(then: str, now: str, output: object = None) -> list[Leaf] | None:
    """Where two texts of outputs differ as values.

    `output` is what `now` was made of, where it is there: an older recording has sets in the order
    of their hashes, and addresses. `None`: they cannot be compared so, since one is no JSON.
    """
    try:
        one, other = (msgspec.json.decode(text) for text in (then, now))
    except Exception:  # numbers of thousands of digits, too
        return None
    compared = _Values(_texts_of_objects(output), lenient_order=_has_set(output))
    return [
        Leaf(_shown(path), _json(one), _json(other))
        for path, one, other in compared.leaves(one, other)
    ]


class _Values:
    """Compares values of JSON, one by one."""

    def __init__(self, objects: frozenset[str], *, lenient_order: bool) -> None:
        self._objects = objects
        self._lenient_order = lenient_order
        self._steps = 0

    def leaves(self, then: object, now: object) -> list[_Place]:
        found: list[_Place] = []
        stack: list[_Place] = [((), then, now)]
        while stack:
            self._steps += 1
            if len(found) >= _MAX_PATHS or self._steps > _MAX_STEPS:
                return [((), then, now)]
            path, one, other = stack.pop()
            if isinstance(one, dict) and isinstance(other, dict):
                stack += [
                    ((*path, name), one.get(name, _MISSING), other.get(name, _MISSING))
                    for name in reversed({**one, **other})
                ]
            elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
                if not self._same_members(one, other):
                    members = enumerate(zip(one, other, strict=True))
                    stack += reversed([((*path, at), *both) for at, both in members])
            elif not self._same(one, other):
                found.append((path, one, other))
        return found

    def _same(self, one: object, other: object) -> bool:
        if type(one) is type(other) and one == other:
            return True
        return (
            isinstance(one, str)
            and isinstance(other, str)
            and other in self._objects
            and stable(one) == other
        )

    def _same_members(self, one: list[Any], other: list[Any]) -> bool:
        """Whether two arrays, one of which may be of a set, have the same members."""
        if not self._lenient_order or len(one) > _MAX_MEMBERS:
            return False
        return sorted(map(_member, one)) == sorted(map(_member, other))


_MISSING = object()


def _member(value: object) -> str:
    return stable(msgspec.json.encode(value, order="deterministic").decode())


def _json(value: object) -> str:
    return "" if value is _MISSING else msgspec.json.encode(value).decode()


def _shown(path: Path) -> str:
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if step.isidentifier() else f"[{msgspec.json.encode(step).decode()}]"
    return text


def _hook(value: object) -> str:
    return stable(repr_of(value))


_encode = msgspec.json.Encoder(enc_hook=_hook, order="deterministic").encode
_encode_anyway: Callable[[object], bytes] = msgspec.json.Encoder(enc_hook=_hook).encode


def _ordered(value: object, depth: int = 64) -> object:
    """The same, with dicts of text as keys, and lists for sets."""
    if not depth:
        return value
    if type(value) is dict:
        pairs = [(_key(key), _ordered(each, depth - 1)) for key, each in value.items()]
        return dict(sorted(pairs, key=lambda pair: pair[0]))
    if type(value) in (set, frozenset):
        members = [msgspec.Raw(_encode(_ordered(each, depth - 1))) for each in value]  # type: ignore[attr-defined]
        return sorted(members, key=bytes)
    if type(value) in (list, tuple):
        return [_ordered(each, depth - 1) for each in value]  # type: ignore[attr-defined]
    return value


def _key(key: object) -> str:
    if type(key) is str:
        return key
    # As JSON has it: of a number its digits, of an Enum its value; raises for what has no such.
    name: dict[str, None] = msgspec.json.decode(_encode_anyway({key: None}))
    return next(iter(name))


def _has_set(output: object) -> bool:
    """Whether a set is in it, as far as that can be seen without asking it."""
    try:
        return any(issubclass(type(each), (set, frozenset)) for each in _walk(output))
    except BaseException:  # whatever its attributes raise
        return False


def _walk(output: object) -> Iterator[object]:
    stack, steps = [output], 0
    while stack and steps < _MAX_STEPS:
        steps += 1
        value = stack.pop()
        kind = type(value)
        yield value
        if kind is dict:
            stack += value.values()  # type: ignore[attr-defined]
        elif kind in (list, tuple):
            stack += value  # type: ignore[arg-type]
        elif issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind):
            names = getattr(kind, "__struct_fields__", None) or vars(value)
            stack += [getattr(value, name, None) for name in names]


def _texts_of_objects(output: object) -> frozenset[str]:
    """What in the text of an output is a `repr`."""
    found: set[str] = set()

    def hook(value: object) -> str:
        found.add(_hook(value))
        return ""

    try:
        msgspec.json.encode(output, enc_hook=hook)
    except BaseException:  # whatever it raises
        found.add(_hook(output))
    return frozenset(found)
