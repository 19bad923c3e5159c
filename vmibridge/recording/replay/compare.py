"""Two answers to one request, compared: field by field, and outputs as values.

    fields = differing_fields(then, now)

`then` and `now` are replies of recordings; where `now` was answered in this process, its output
may be given as it is. No handler, VM or file is needed.

| field | is compared |
|---|---|
| `outcome`, `handler` | by name |
| `rip`, `value1` to `value4` | as written to the guest |
| `error` | as text, without the addresses of objects |
| `output` | as a value of JSON; what JSON cannot hold, by its `repr` without addresses |
| `read`, `write` | by a replay alone: accesses to guest memory |
| `outside` | by a replay alone: calls of `vmi.outside` |
"""

from typing import Any

import msgspec

from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.packet import BridgePacket
from vmibridge.recording.messages import MemoryAccess, PlainTrap, Reply
from vmibridge.recording.outputs import MAX_TEXT, Leaf, OutputText, leaves_of, output_text, stable
from vmibridge.recording.traps import VALUE_NAMES, access_text
from vmibridge.text import counted

__all__ = [
    "FIELDS",
    "Difference",
    "FieldDifference",
    "describe",
    "differing_fields",
    "is_cut",
    "is_same",
    "reply_of",
]

FIELDS = ("outcome", "handler", "rip", *VALUE_NAMES, "error", "output", "read", "write", "outside")
"""All names that a field has."""


class FieldDifference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is not as it was."""

    field: str
    """`outcome`, `handler`, `value1` to `value4`, `rip`, `output`, `error`, `read`, `write`,
    `outside`."""
    expected: str
    got: str
    paths: tuple[str, ...] = ()
    """Of an output: what in it differs, as `output.items[3].id`. Empty: all of it."""


class Difference(msgspec.Struct, frozen=True):
    """A request that was answered in another way than in the recording."""

    vm: str
    vcpu: int
    seq: int
    """Of the trap that it came with."""
    time: int
    """When that was recorded, in nanoseconds since the Unix epoch."""
    packet: BridgePacket | None
    fields: tuple[FieldDifference, ...]
    accesses: tuple[MemoryAccess, ...] = ()
    """The last ones that its handler made now."""
    handler: str | None = None
    """Which handler took it then; else the one that takes it now."""


def reply_of(outcome: Outcome[Any], then: Reply) -> Reply:
    """An outcome as a recording has it, in the place of the reply `then`: its trap, its times."""
    text, digest = OutputText.of(outcome.output)
    return msgspec.structs.replace(
        then,
        kind=outcome.kind,
        writes=outcome.writes,
        handler=outcome.handler,
        error=outcome.error,
        output=text,
        output_sha256=digest,
    )


def is_same(then: Reply | PlainTrap, now: Outcome[Any], *, whole: bool) -> bool:
    """Whether nothing differs at first sight, as for nearly all. `whole`: texts count."""
    if (then.kind, then.handler, then.writes) != (now.kind, now.handler, now.writes):
        return False
    if not whole:
        return True
    if then.error != now.error:
        return False
    output = now.output
    if output is None:
        return then.output is None
    text = output_text(output)
    if text is not None and len(text) <= MAX_TEXT:
        return then.output == text
    return (then.output, then.output_sha256) == OutputText.of(output)


def differing_fields(
    then: Reply, now: Reply, output: object = None, *, whole: bool = True
) -> list[FieldDifference]:
    """What differs; nothing: they are the same. `output` is what `now.output` was made of.

    Unless `whole`, texts are not compared: something of a reply was left out.
    """
    found: list[FieldDifference] = []

    def differ(field: str, expected: str, got: str) -> None:
        if expected != got:
            found.append(FieldDifference(field, expected, got))

    differ("outcome", then.kind.value, now.kind.value)
    differ("handler", then.handler or "none", now.handler or "none")
    for name, one, other in zip(("rip", *VALUE_NAMES), _numbers(then), _numbers(now), strict=True):
        differ(name, _number(one), _number(other))
    if whole:
        differ("error", _text(then.error), _text(now.error))
        different = _differing_output(then, now, output)
        if different is not None:
            found.append(different)
    return found


def is_cut(reply: Reply | PlainTrap) -> bool:
    """Whether the end of its output is in no recording, as in one of 0.2.0."""
    output = reply.output
    return (
        reply.output_sha256 is None
        and output is not None
        and len(output) == MAX_TEXT + 3
        and output.endswith("...")
    )


def describe(access: MemoryAccess) -> str:
    """One access, in one line."""
    what = "write" if access.write else "read"
    return f"{what} of {counted(access.size, 'byte')} at {access.address:#x}: {access_text(access)}"


def _differing_output(then: Reply, now: Reply, output: object) -> FieldDifference | None:
    one, other = then.output, now.output
    if (one, then.output_sha256) == (other, now.output_sha256):
        return None
    leaves: list[Leaf] | None = None
    if one is not None and other is not None:
        if is_cut(then) or is_cut(now):
            whole = output_text(output) or other
            if one[:MAX_TEXT] in (whole[:MAX_TEXT], other[:MAX_TEXT]):
                return None  # what is behind is not known; the caller asks `is_cut`
        elif then.output_sha256 is None and now.output_sha256 is None:
            leaves = leaves_of(one, other, output)
            if leaves == []:
                return None
    return FieldDifference(
        "output",
        _output(one, then.output_sha256),
        _output(other, now.output_sha256),
        tuple(f"output{leaf.path}" for leaf in leaves or ()),
    )


def _output(text: str | None, digest: str | None) -> str:
    # Two that differ behind the cut do so here, too.
    return _text(text) if digest is None else f"{text} (SHA-256 of all of it: {digest})"


def _numbers(reply: Reply) -> tuple[int | None, ...]:
    writes = reply.writes
    return (None,) * 5 if writes is None else (writes.rip, *writes.values)


def _number(value: int | None) -> str:
    return "left alone" if value is None else f"{value:#x}"


def _text(text: str | None) -> str:
    return "none" if text is None else stable(text)
