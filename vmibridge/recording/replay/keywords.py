"""The keywords of a replay in a program, checked before anything is opened.

They come of a mark of pytest, too: so what is wrong with one is a `ConfigError` of one line, which
names it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from vmibridge.bridge.bounds import problem_of
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError
from vmibridge.recording.replay.accepted import Accepted
from vmibridge.recording.replay.ignore import IgnoreRule
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.own_loop import LoopName
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.selection import Selection
from vmibridge.text import repr_of, type_name

__all__ = ["Keywords", "Order", "check_settings", "is_name"]

Order: TypeAlias = Literal["recorded", "vcpu"]
_MAX_NAME = 64
"""Characters of the name of a VM."""


class Keywords(msgspec.Struct, frozen=True):
    """Those of a replay, but for the settings of its server. What may be given several times is a
    tuple here."""

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
    no_outside: bool
    speed: int | float
    order: Order
    rename: dict[str, str] | None
    accept: bool
    loop: LoopName | None

    @classmethod
    def checked(cls, **given: object) -> "Keywords":
        """Raises `ConfigError`."""
        found: dict[str, Any] = {}
        for name, value in given.items():
            if name in _CHOICES:
                found[name] = _chosen(name, value)
            else:
                found[name] = _converted(cls, name, _tuple(name, value))
        keywords = cls(**found)
        for name in ("first", "last"):
            number = found[name]
            if number is not None and number < 0:
                raise ConfigError(f"{name} is the number of a trap, from 0, not {number}")
        if not 0 <= keywords.speed < math.inf:
            raise ConfigError(f"speed is a number from 0, not {keywords.speed}")
        for old, new in (keywords.rename or {}).items():
            if not (old and is_name(new)):
                raise ConfigError(f"rename: {old!r} to {new!r}: is not two names of a VM")
        return keywords

    def selection(self) -> Selection:
        """What is compared. Raises `ConfigError` for a value that is out of range."""
        return Selection.parse(
            requests=map(str, self.requests),
            methods=map(str, self.methods),
            outcomes=self.outcomes,
            vms=self.vms,
            vcpus=self.vcpus,
            since=None if self.since is None else str(self.since),
            until=None if self.until is None else str(self.until),
            first=self.first,
            last=self.last,
        )

    def verdict(self, selection: Selection) -> Verdict:
        """What counts of that. Raises `ConfigError` for what is no rule."""
        verdict = Verdict(selection, map(IgnoreRule.parse, self.ignore))
        if self.accept:
            verdict.accepted = Accepted(all_handlers=selection == _ALL)
        return verdict

    def options(self) -> ReplayOptions:
        """How it is replayed."""
        outside: Literal["call", "refuse"] = "refuse" if self.no_outside else "call"
        return ReplayOptions(self.speed, self.order, None, self.strict, outside)


_ALL = Selection()
_LISTS = frozenset(("requests", "methods", "outcomes", "vms", "vcpus", "ignore"))
_CHOICES: Mapping[str, Any] = {"order": Order, "loop": LoopName | None}


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


def _tuple(name: str, value: object) -> object:
    if name not in _LISTS:
        return value
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
