"""Which requests of a replay are compared, what of them counts, and what was found in all.

One `Verdict` is for all VMs and all files of a replay:

- Every request is asked, so that handlers get to the state that they had then; those that the
  selection takes are compared. What was taken after all of them were answered is not asked.
- A difference is what the rules leave of it (`ignore`).
- Differences of one field of one method are one `Finding`: a wrong step of state shows in every
  answer behind it. Findings are in the order of their first difference, so the cause is first.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.packet import BridgePacket
from vmibridge.errors import ConfigError
from vmibridge.recording.messages import Reply, Session
from vmibridge.recording.method_names import MethodNames
from vmibridge.recording.outputs import leaves_of
from vmibridge.recording.replay.accepted import Accepted
from vmibridge.recording.replay.compare import Difference, FieldDifference
from vmibridge.recording.replay.ignore import Ignored, IgnoreRule
from vmibridge.recording.replay.last_traps import LastTraps
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.selection import Selection
from vmibridge.recording.session import recorded_handler
from vmibridge.recording.traps import RecordedTrap
from vmibridge.vm.trap import TrapEvent

__all__ = ["Finding", "Findings", "RequestKind", "Verdict"]

_MAX_FINDINGS = 1000
_MAX_KINDS = 10_000
_ALL = Selection()


class RequestKind(NamedTuple):
    """What requests are counted by."""

    handler: str | None
    method: str
    """Its name, or else its code."""


class Finding(msgspec.Struct):
    """All differences of one field of one method."""

    handler: str | None
    method: str
    """Its name, or else its code."""
    field: str
    """As `FieldDifference.field`, or a place in an output with `[*]` for its numbers."""
    count: int
    """Requests that differ in it."""
    vm: str
    """Of the first of them, as are all fields below."""
    vcpu: int
    seq: int
    time: int
    expected: str
    got: str
    last_seq: int
    step: int | None = None
    """By how much each number differs, where it is the same in all: `got - expected`."""


class Findings:
    """Differences, grouped. Holds 1,000 groups at most."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str | None, str, str], Finding] = {}
        self.left_out: int = 0
        """Differing fields that were too much to group."""

    def add(self, difference: Difference, method: str) -> None:
        """One more difference; `method` is the name of its method, or else its code."""
        # Several fields of one request may have one name, as those of its accesses.
        first: dict[str, FieldDifference] = {}
        for each in difference.fields:
            for name in _places(each):
                first.setdefault(name, each)
        for name, each in first.items():
            self._add(difference, each, method, name)

    def all(self) -> list[Finding]:
        """The one that began first in front."""
        # The sort is stable: what differed in one request stays in the order of its fields.
        return sorted(self._groups.values(), key=lambda each: each.time)

    def _add(self, difference: Difference, each: FieldDifference, method: str, name: str) -> None:
        key = (difference.handler, method, name)
        known = self._groups.get(key)
        step = _step(each)
        if known is not None:
            known.count += 1
            if difference.time < known.time:
                # It came before the others, and was answered later.
                known.vm, known.vcpu = difference.vm, difference.vcpu
                known.seq, known.time = difference.seq, difference.time
                known.expected, known.got = _values(each, name)
            else:
                known.last_seq = difference.seq
            if step != known.step:
                known.step = None
        elif len(self._groups) >= _MAX_FINDINGS:
            self.left_out += 1
        else:
            seq = difference.seq
            expected, got = _values(each, name)
            self._groups[key] = Finding(
                difference.handler,
                method,
                name,
                1,
                difference.vm,
                difference.vcpu,
                seq,
                difference.time,
                expected,
                got,
                seq,
                step,
            )


class Verdict:
    """See the module. By default all is compared, and all counts."""

    def __init__(
        self,
        selection: Selection = _ALL,
        ignore: Iterable[IgnoreRule] = (),
        *,
        limit: int | None = None,
        fail_fast: bool = False,
        count_kinds: bool = False,
    ) -> None:
        """`limit`: end after so many requests were compared; `fail_fast`: after one that differs.
        `count_kinds`: count requests by handler and method, too."""
        self.findings: Findings = Findings()
        self.compared: Counter[RequestKind] = Counter()
        self.is_over: bool = False
        """Whether nothing further is to be compared."""
        self.start: int = 0
        """When the first trap of the file was taken; 0: when that of each VM was."""
        self.accepted: Accepted | None = None
        """Where new answers that differ are kept; `None`: they are not."""
        self._selection = selection
        self.selects: bool = selection != _ALL
        """Whether some requests may not be compared."""
        self.counts: bool = count_kinds or limit is not None
        """Whether requests that are the same count for something."""
        self._rules = tuple(ignore)
        self._ignored = Ignored(self._rules)
        self._of_handlers: set[str] = set()
        self._limit = limit
        self._fail_fast = fail_fast
        self._count_kinds = count_kinds
        self._names = MethodNames()
        self._stops: list[Callable[[], None]] = []
        self._last = LastTraps(selection.vms)
        self._count = 0

    def begin_vm(
        self,
        vm: str,
        session: Session | None,
        stop: Callable[[], None],
        requests: Callable[[], Iterable[ReplayedRequest]],
    ) -> None:
        """A VM is about to be replayed: its recorded name, what served it, what ends its replay,
        and what gives its open requests."""
        self._last.add(vm, requests)
        if session is not None:
            self._names.learn(session)
        self._stops.append(stop)

    def hear_handlers(self, vm: str, handlers: Sequence[BridgeHandler[Any]]) -> None:
        """Take the rules that handlers have. Raises `ConfigError` for one that is none."""
        if self.accepted is not None:
            self.accepted.hear_handlers(vm, map(recorded_handler, handlers))
        for handler in handlers:
            self._last.has_shared |= handler.shared
            if not handler.replay_ignore or handler.name in self._of_handlers:
                continue
            self._of_handlers.add(handler.name)
            where = f"{handler.name}.replay_ignore: "
            rules = [IgnoreRule.parse(str(text), where) for text in handler.replay_ignore]
            for rule in rules:
                if rule.request is not None:
                    raise ConfigError(f"{where}{rule.text!r}: is of this handler as it is")
            self._rules += tuple(
                msgspec.structs.replace(rule, request=handler.name) for rule in rules
            )
        self._ignored = Ignored(self._rules)

    def is_behind(self, vm: str, seq: int, time: int, start: int) -> bool:
        """Whether a trap was taken after all that are compared had been answered. `vm` is its VM as
        recorded."""
        if self.is_over:
            return True
        is_past = self._selection.is_behind(seq, time, self.start or start)
        return is_past and self._last.are_answered(vm)

    def takes(
        self,
        vm: str,
        event: TrapEvent,
        time: int,
        packet: BridgePacket | None,
        reply: Reply | None,
        start: int,
    ) -> bool:
        """Whether a request is to be compared. `vm` is its VM as recorded."""
        if self.is_over:
            return False
        if event.vm != vm:
            event = msgspec.structs.replace(event, vm=vm)
        method = None
        if packet is not None and reply is not None:
            method = self._names.name(vm, reply.handler, packet.method)
        trap = RecordedTrap(time, event, packet, reply=reply)
        return self._selection.takes(trap, self.start or start, method)

    def judge(
        self, vm: str, request: ReplayedRequest, difference: Difference | None
    ) -> Difference | None:
        """One request was compared; returns what counts of its difference."""
        reply = request.reply
        assert reply is not None
        if self._count_kinds:
            kind = RequestKind(reply.handler, self.method_name(vm, reply.handler, reply.packet))
            if kind in self.compared or len(self.compared) < _MAX_KINDS:
                self.compared[kind] += 1
        self._count += 1
        if difference is not None and self._rules:
            difference = self._ignored.without(difference)
        if difference is not None:
            method = self.method_name(vm, difference.handler, difference.packet)
            self.findings.add(difference, method)
            if self.accepted is not None:
                self.accepted.keep(vm, request)
        if self._count == self._limit or (self._fail_fast and difference is not None):
            self.end()
        return difference

    def end(self) -> None:
        """Compare nothing further, in no VM and no file."""
        self.is_over = self.selects = True
        for stop in self._stops:
            stop()
        self._stops.clear()

    def begin_file(self, start: int = 0) -> None:
        """Another file is to be replayed, whose first trap was taken at `start`, if that is known.

        What was found so far is of the one before."""
        self.start = start
        self.findings, self.compared = Findings(), Counter()
        self._names = MethodNames()
        self._stops.clear()
        self._last = LastTraps(self._selection.vms)

    def method_name(self, vm: str, handler: str | None, packet: BridgePacket | None) -> str:
        """Its name, or else its code. `vm` is its VM as recorded."""
        if packet is None:
            return ""
        return self._names.name(vm, handler, packet.method) or f"{packet.method:#06x}"


def _places(field: FieldDifference) -> Sequence[str]:
    if not field.paths:
        return (field.field,)
    return list(map(_without_numbers, field.paths))


def _without_numbers(path: str) -> str:
    parts = path.split("[")
    shown = [f"*{part[part.index(']') :]}" if part[:1].isdigit() else part for part in parts[1:]]
    return "[".join((parts[0], *shown))


def _values(field: FieldDifference, name: str) -> tuple[str, str]:
    """What is at the place of an output that has this name; or the whole field."""
    for leaf in (field.paths and leaves_of(field.expected, field.got)) or ():
        if _without_numbers(f"output{leaf.path}") == name:
            return leaf.then or "nothing", leaf.now or "nothing"
    return field.expected, field.got


def _step(field: FieldDifference) -> int | None:
    try:
        return int(field.got, 0) - int(field.expected, 0)
    except ValueError:
        return None
