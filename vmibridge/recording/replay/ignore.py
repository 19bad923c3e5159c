"""What a comparison is to leave out, by rules such as `output.id` and `0x0300:value2`.

| rule | ignores |
|---|---|
| `value2`, `error`, ... | a field, by its name: one of `FIELDS` |
| `output.id` | what is there in an output, and below it |
| `output.items[*].*` | the same; `*` is any index, or any name |
| `/REGEX/` | what it matches, in texts of outputs and errors; and each name that it matches whole |
| `REQUEST:...` | the same, of one request (0x0300, 768), or of one handler (its name) |

A rule never makes a request different that was the same. What a text of more than 4,096
characters has behind them is ignored with the whole `output` alone.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from vmibridge.errors import ConfigError
from vmibridge.recording.outputs import leaves_of
from vmibridge.recording.replay.compare import FIELDS, Difference, FieldDifference

__all__ = ["IgnoreRule", "Ignored"]

_SCOPE = re.compile(
    r"(?P<request>0[xX][0-9a-fA-F]{1,4}|[0-9]{1,5}|[A-Za-z_][\w-]*):(?P<rest>.+)", re.DOTALL
)
_STEPS = re.compile(r'(?:\.(?:\w+|\*)|\[(?:\d+|\*|"(?:[^"\\]|\\.)*")\])*')
_STEP = re.compile(r'\.(?:\w+|\*)|\[(?:\d+|\*|"(?:[^"\\]|\\.)*")\]')
_NAME = re.compile(r"\.(\w+)$")
_TEXTS = ("output", "error")


class IgnoreRule(msgspec.Struct, frozen=True):
    """One thing that does not count."""

    text: str
    """As it was given."""
    place: re.Pattern[str]
    """Matches the whole name of a field, or of a place in an output."""
    pattern: re.Pattern[str] | None = None
    """What does not count in a text."""
    request: int | str | None = None
    """Of this request, or of the handler of this name; `None`: of all."""

    @classmethod
    def parse(cls, text: str, where: str = "") -> Self:
        """From `[REQUEST:]RULE`. Raises `ConfigError`, which begins with `where`."""
        rest, request = text, None
        scoped = None if text.startswith("/") else _SCOPE.fullmatch(text)
        if scoped is not None:
            rest, request = scoped["rest"], _request(scoped["request"])
        if isinstance(request, int) and request >> 16:
            raise _no_rule(text, where)
        if len(rest) > 2 and rest[0] == rest[-1] == "/":
            try:
                pattern = re.compile(rest[1:-1])
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(
                    f"{where}{text[:80]!r}: is not a regular expression: {error}"
                ) from None
            return cls(text, pattern, pattern, request)
        field = next((name for name in FIELDS if rest.startswith(name)), None)
        steps = rest.removeprefix(field or "")
        if field is None or not _STEPS.fullmatch(steps) or (steps and field != "output"):
            raise _no_rule(text, where)
        inner = "".join(map(_step, _STEP.findall(steps)))
        return cls(text, re.compile(rf"{field}{inner}(?:[.\[].*)?", re.DOTALL), None, request)

    def is_for(self, difference: Difference) -> bool:
        """Whether it is about that request."""
        request = self.request
        if request is None:
            return True
        packet = difference.packet
        if packet is not None and packet.request == request:
            return True
        # By its recorded name, or by its present one.
        renamed = (each.got for each in difference.fields if each.field == "handler")
        return request in (difference.handler, *renamed)


class Ignored:
    """A set of rules."""

    def __init__(self, rules: Iterable[IgnoreRule] = ()) -> None:
        self.rules: tuple[IgnoreRule, ...] = tuple(rules)

    def without(self, difference: Difference) -> Difference | None:
        """What is left of a difference; `None`: nothing that counts."""
        rules = [rule for rule in self.rules if rule.is_for(difference)]
        if not rules:
            return difference
        found = [_without(each, rules) for each in difference.fields]
        fields = tuple(each for each in found if each is not None)
        if fields == difference.fields:
            return difference
        return msgspec.structs.replace(difference, fields=fields) if fields else None


def _without(field: FieldDifference, rules: Sequence[IgnoreRule]) -> FieldDifference | None:
    if any(rule.place.fullmatch(field.field) for rule in rules):
        return None
    if field.field in _TEXTS and _masked(field.expected, rules) == _masked(field.got, rules):
        return None
    if not field.paths:
        return field
    masked: set[str] = set()
    if any(rule.pattern is not None for rule in rules):
        for leaf in leaves_of(field.expected, field.got) or ():
            # With its name, as it stands in the whole text.
            name = _NAME.search(leaf.path)
            front = "" if name is None else f'"{name[1]}":'
            if _masked(f"{front}{leaf.then}", rules) == _masked(f"{front}{leaf.now}", rules):
                masked.add(f"output{leaf.path}")
    paths = tuple(
        path
        for path in field.paths
        if path not in masked and not any(rule.place.fullmatch(path) for rule in rules)
    )
    return msgspec.structs.replace(field, paths=paths) if paths else None


def _masked(text: str, rules: Sequence[IgnoreRule]) -> str:
    for rule in rules:
        if rule.pattern is not None:
            text = rule.pattern.sub("", text)
    return text


def _step(step: str) -> str:
    if step == ".*":
        return r'(?:\.\w+|\["(?:[^"\\]|\\.)*"\])'
    return r"\[\d+\]" if step == "[*]" else re.escape(step)


def _request(text: str) -> int | str:
    if not text[0].isdigit():
        return text
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def _no_rule(text: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}{text[:80]!r} is not a rule of what to ignore: it is a field"
        f" ({', '.join(FIELDS)}), a place in an output, as in output.items[*].id, or a /REGEX/;"
        " or one of them behind a request, as in 0x0300:value2"
    )
