"""A selection that takes no trap of a recording: what was asked for, and what there is.

    unmatched = Unmatched(selection)
    unmatched.look_at(reader.messages())
    if not unmatched.has_some:
        raise ConfigError(f"{reader.path}: {unmatched}")

Every command with such a selection says it so. What is held does not grow with the file.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.selection import Moment, SelectedTraps, Selection
from vmibridge.recording.traps import RecordedTrap, outcome_word
from vmibridge.text import counted

__all__ = ["Unmatched"]

_MAX_SHOWN = 20
"""Of one kind, as of requests."""
_MAX_NAME = 40
"""Characters."""


class Unmatched:
    """What a selection was looked for in."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.has_some: bool = False
        """Whether it takes a trap, after all."""
        self._found: dict[str, dict[str, None]] = {}
        self._traps = 0
        self._times: tuple[int, int] | None = None
        self._elapsed: tuple[int, int] | None = None
        """Since the first trap of each recording."""
        self._seqs: tuple[int, int] | None = None

    def look_at(self, messages: Iterable[TimedMessage]) -> None:
        """Look for it in one more recording. Raises `RecordingReadError`."""
        traps = SelectedTraps(messages, self._selection, lambda _: None)
        for trap in traps.every():
            if traps.takes(trap):
                self.has_some = True
                return
            self._add(trap, traps)

    def __str__(self) -> str:
        """As the end of an error message."""
        asked = ", ".join(_asked_for(self._selection))
        if not self._traps:
            return f"no trap matches {asked}: there is no trap at all"
        return f"no trap matches {asked}; there are {'; '.join(self._there())}"

    def _add(self, trap: RecordedTrap, traps: SelectedTraps) -> None:
        self._traps += 1
        event, packet, reply = trap.event, trap.packet, trap.reply
        self._times = _wider(self._times, trap.time)
        self._elapsed = _wider(self._elapsed, trap.time - traps.start)
        self._seqs = _wider(self._seqs, event.seq)
        self._see("VMs", event.vm)
        self._see("vCPUs", str(event.vcpu))
        self._see("outcomes", outcome_word(trap))
        if packet is not None:
            handler = None if reply is None else reply.handler
            self._see("requests", _named(packet.request, handler))
            self._see("methods", _named(packet.method, traps.method_of(trap)))

    def _see(self, kind: str, what: str) -> None:
        seen = self._found.setdefault(kind, {})
        if len(seen) <= _MAX_SHOWN:
            seen[_short(what)] = None

    def _there(self) -> Iterator[str]:
        selection = self._selection
        for kind, asked in (
            ("requests", selection.requests),
            ("methods", selection.methods),
            ("outcomes", selection.outcomes),
            ("vCPUs", selection.vcpus),
            ("VMs", selection.vms),
        ):
            if asked:
                seen = [*self._found.get(kind, {})]
                shown = ", ".join(sorted(seen[:_MAX_SHOWN])) or "none"
                yield f"{kind} {shown}{', ...' if len(seen) > _MAX_SHOWN else ''}"
        if self._seqs is not None and not selection.first is selection.last is None:
            yield f"traps {self._seqs[0]} to {self._seqs[1]}"
        asked_for = selection.since or selection.until
        if asked_for is not None:
            times = self._elapsed if asked_for.relative else self._times
            first, last = (_time(each, asked_for) for each in times or ())
            yield f"{counted(self._traps, 'trap')} from {first} to {last}"


def _asked_for(selection: Selection) -> Iterator[str]:
    kinds = (
        ("request", [_code(each) for each in selection.requests]),
        ("method", [_code(each) for each in selection.methods]),
        ("outcome", ["none" if each is None else each.value for each in selection.outcomes]),
        ("vCPU", [str(each) for each in selection.vcpus]),
        ("VM", [_short(each) for each in selection.vms]),
    )
    for kind, names in kinds:
        if names:
            yield f"{kind} {' or '.join(sorted(names))}"
    for word, moment in (("since", selection.since), ("until", selection.until)):
        if moment is not None:
            yield f"{word} {_time(moment.nanoseconds, moment)}"
    for word, seq in (("from", selection.first), ("to", selection.last)):
        if seq is not None:
            yield f"{word} trap {seq}"


def _code(code: int | str) -> str:
    return f"{code:#06x}" if isinstance(code, int) else _short(code)


def _named(code: int, name: str | None) -> str:
    return f"{code:#06x}" if name is None else f"{code:#06x} ({_short(name)})"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}..."


def _wider(known: tuple[int, int] | None, value: int) -> tuple[int, int]:
    return (value, value) if known is None else (min(known[0], value), max(known[1], value))


def _time(nanoseconds: int, asked: Moment) -> str:
    """A time in the form of the one that was asked for."""
    if asked.relative:
        return f"{nanoseconds / 1e9:g} s"
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat()
