"""What is left out of a recording, by rules such as `memory` and `0x0002:value3`.

| rule | leaves out |
|---|---|
| `memory` | the bytes of each access to guest memory; address and size stay |
| `value1` to `value4` | that value of the request, and of its answer |
| `settings` | the settings of handlers, in the session |
| `REQUEST:...` | the same, of one request only |

A trap that a rule is for loses its output and the text of its error, too: they may quote
what was left out. Magic, request and method always stay.

A value stays in the guest's registers when its request is over. So as soon as any value is
left out, every trap loses the general registers in which it asks nothing; but where the
guest itself passes a value on, in another request, a rule for that request is needed.
"""

import re
from collections.abc import Iterable
from typing import Literal, Self

import msgspec

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import form_of
from vmibridge.errors import ConfigError
from vmibridge.vm.trap import RegisterWrites, TrapEvent

_RULE = re.compile(
    r"(?:(?P<request>0[xX][0-9a-fA-F]{1,4}|[0-9]{1,5}):)?(?P<what>memory|settings|value[1-4])"
)
_VALUES = ("value1", "value2", "value3", "value4")
_ANSWERS = RegisterWrites.__struct_fields__[1:]


class RedactionRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is left out."""

    what: Literal["memory", "value1", "value2", "value3", "value4", "settings"]
    request: int | None = None
    """Of this request; `None`: of all."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `[REQUEST:]WHAT`. Raises `ConfigError`."""
        found = _RULE.fullmatch(text)
        code = None if found is None else found["request"]
        # In decimal zeros may lead, which base 0 refuses.
        request = None if code is None else int(code, 16 if code[:2] in ("0x", "0X") else 10)
        if found is None or (request or 0) >> 16:
            raise ConfigError(
                f"{text[:40]!r} is not a redaction: it is memory, settings, value1 to value4,"
                " or one of them behind a request, as in 0x0002:value3"
            )
        return msgspec.convert({"what": found["what"], "request": request}, cls)

    def __str__(self) -> str:
        return self.what if self.request is None else f"{self.request:#06x}:{self.what}"


class Redaction:
    """A set of rules."""

    def __init__(self, rules: Iterable[RedactionRule | str] = ()) -> None:
        """Raises `ConfigError` for text that is no rule."""
        self.rules: tuple[RedactionRule, ...] = tuple(
            RedactionRule.parse(rule) if isinstance(rule, str) else rule for rule in rules
        )
        self._values = any(rule.what in _VALUES for rule in self.rules)
        self.of_traps: tuple[RedactionRule, ...] = tuple(
            rule for rule in self.rules if rule.what != "settings"
        )
        """What a session says of them: those that are about traps. vmibridge 0.2.0 knows no others,
        and would not read the session."""

    def hides_settings(self, request: int) -> bool:
        """Whether the settings of the handler of a request are left out."""
        settings = (rule for rule in self.rules if rule.what == "settings")
        return any(rule.request in (None, request) for rule in settings)

    def of(self, request: int) -> frozenset[str]:
        """What is left out of the traps of a request: `memory`, names of values."""
        return frozenset(rule.what for rule in self.of_traps if rule.request in (None, request))

    def trap(self, event: TrapEvent, left_out: frozenset[str]) -> TrapEvent:
        """The trap with zeros for the values that are left out, and for what may repeat one."""
        if not self._values:
            return event
        names = form_of(event.reason, event.width).names
        hidden = {
            name for name, value in zip(names[2:], _VALUES, strict=False) if value in left_out
        }
        zeros = hidden.union(event.architecture.values) - ({*names} - hidden)
        registers = msgspec.structs.replace(event.registers, **dict.fromkeys(zeros, 0))
        return msgspec.structs.replace(event, registers=registers)

    def packet(self, packet: BridgePacket, left_out: frozenset[str]) -> BridgePacket:
        """The packet, in the same way."""
        return msgspec.structs.replace(packet, **dict.fromkeys(left_out & {*_VALUES}, 0))

    def writes(self, writes: RegisterWrites, left_out: frozenset[str]) -> RegisterWrites:
        """The answer without the values that are left out."""
        names = (name for name, value in zip(_ANSWERS, _VALUES, strict=True) if value in left_out)
        return msgspec.structs.replace(writes, **dict.fromkeys(names))
