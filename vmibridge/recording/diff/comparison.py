"""Two recordings, compared request by request.

In a first pass each recording is made into rows of digests, one row for each vCPU. The rows are
aligned; in a second pass what differs is looked at field by field.
"""

from array import array
from collections.abc import Collection, Iterator, Mapping
from hashlib import blake2b
from secrets import token_bytes

import msgspec

from vmibridge.errors import RecordingReadError
from vmibridge.recording.diff.alignment import aligned
from vmibridge.recording.diff.requests import (
    FIELDS,
    Request,
    fields_of,
    is_answered,
    requests_of,
    shown_field,
)
from vmibridge.recording.edit.changes import Changes
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import SESSION, Session
from vmibridge.recording.redaction import RedactionRule
from vmibridge.recording.selection import Selection
from vmibridge.recording.vm_names import VmNames

__all__ = ["Comparison", "Group", "compare"]

REGISTERS = "registers"
ONLY_IN_A, ONLY_IN_B = "only in A", "only in B"
MAX_REQUESTS = 1 << 23
"""Of one recording: some 40 bytes are held for each."""
MAX_DETAILED = 100_000
"""Differences that are looked at field by field; further ones are counted."""
_MAX_REMEMBERED = 2000
"""Differences whose values are held, to be shown."""
_MAX_LANES = 65_536
_MAX_GROUPS = 1000
_MAX_SHOWN = 200
"""Characters of a value."""
_MAX_RULES = 1000

_Lane = tuple[str, int]
"""A VM and a vCPU."""
_encode = msgspec.msgpack.Encoder().encode


class Group(msgspec.Struct):
    """Requests that differ in the same way."""

    where: str
    """The handler, or the magic; the request and the method."""
    field: str
    """One of `FIELDS`, or that they are only in one of the recordings."""
    count: int
    vm: str
    """Of the first of them, as the next ones."""
    vcpu: int
    seq_a: int | None
    """The number of its trap in A."""
    seq_b: int | None
    a: str = ""
    """What it is in A, for people."""
    b: str = ""


class Comparison(msgspec.Struct):
    """What two recordings have in common."""

    compared: int = 0
    """Requests that are in both and have a reply."""
    different: int = 0
    """Those of them that differ."""
    only_a: int = 0
    only_b: int = 0
    unanswered: int = 0
    """In both, and without a reply in either."""
    partial: int = 0
    """Compared, but for what was left out of a recording."""
    problems: int = 0
    """Places of the files that could not be read."""
    groups: list[Group] = []
    """The differences, in the order of the first of each in A; at most 1,000."""

    @property
    def is_same(self) -> bool:
        """Whether all was compared, and nothing differs."""
        return (
            self.compared > 0
            and not self.different
            and not self.only_a
            and not self.only_b
            and not self.problems
        )


def _row() -> "array[int]":
    return array("Q")


class _Row(msgspec.Struct):
    """One vCPU."""

    keys: "array[int]" = msgspec.field(default_factory=_row)
    wholes: "array[int]" = msgspec.field(default_factory=_row)
    """Of all fields, but for the bytes of accesses."""
    read: "array[int]" = msgspec.field(default_factory=_row)
    """Of the bytes that were read."""
    write: "array[int]" = msgspec.field(default_factory=_row)
    flags: bytearray = msgspec.field(default_factory=bytearray)


_ANSWERED, _PARTIAL, _NO_READS, _NO_WRITES = 1, 2, 4, 8


class _Side:
    """One of the recordings."""

    def __init__(
        self,
        reader: RecordingReader,
        selection: Selection,
        changes: Changes,
        ignored: Collection[str],
        key: bytes,
    ) -> None:
        self.reader = reader
        self._selection = selection
        self._changes = changes
        self._ignored = frozenset(ignored)
        self._key = key
        self.rows: dict[_Lane, _Row] = {}

    def read(self) -> None:
        """Make the rows. Raises `RecordingReadError` where there are too many requests."""
        for count, (lane, request) in enumerate(self._requests()):
            row = self.rows.get(lane)
            if row is None:
                if len(self.rows) >= _MAX_LANES:
                    raise RecordingReadError(
                        f"{self.reader.path}: has more than {_MAX_LANES} vCPUs"
                    )
                row = self.rows[lane] = _Row()
            if count >= MAX_REQUESTS:
                raise RecordingReadError(
                    f"{self.reader.path}: has more than {MAX_REQUESTS} requests; compare parts of"
                    " it, with --since and --until"
                )
            fields = fields_of(request)
            row.keys.append(self._digest(fields["request"]))
            row.wholes.append(self._digest([fields.get(name) for name in self._compared]))
            row.read.append(self._digest("read" in self._ignored or request.read.data))
            row.write.append(self._digest("write" in self._ignored or request.write.data))
            row.flags.append(
                _ANSWERED * is_answered(request)
                | _PARTIAL * request.is_partial
                | _NO_READS * request.read.left_out
                | _NO_WRITES * request.write.left_out
            )

    def chosen(self, wanted: Mapping[_Lane, Mapping[int, int]]) -> Iterator[tuple[int, Request]]:
        """The requests of these places, with the number that each place has there."""
        places: dict[_Lane, int] = {}
        for lane, request in self._requests():
            place = places.get(lane, 0)
            places[lane] = place + 1
            number = wanted.get(lane, {}).get(place)
            if number is not None:
                yield number, request

    @property
    def _compared(self) -> list[str]:
        return [name for name in FIELDS if name not in self._ignored]

    def digests(self, request: Request, flags: int) -> "array[int]":
        """One for each field. Of accesses whose bytes are not in both, without the bytes."""
        fields = fields_of(request)
        no_reads, no_writes = flags & _NO_READS, flags & _NO_WRITES
        return array(
            "Q",
            (
                self._digest(
                    [
                        fields.get(name),
                        request.read.data if name == "read" and not no_reads else b"",
                        request.write.data if name == "write" and not no_writes else b"",
                    ]
                )
                for name in FIELDS
            ),
        )

    def _requests(self) -> Iterator[tuple[_Lane, Request]]:
        names = VmNames()
        for request in requests_of(self.reader.messages(), self._selection, self._changes):
            yield (names.once(request.event.vm), request.event.vcpu), request

    def _digest(self, value: object) -> int:
        digest = blake2b(_encode(value), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little")


class _Pair(msgspec.Struct):
    """A request of each recording that differ, or one that is only in one of them."""

    flags: int
    one: bool = False
    other: bool = False
    digests: "array[int] | None" = None
    """Of A."""
    shown: list[str] | None = None
    where: str = ""
    time: int = 0
    seq_a: int | None = None
    seq_b: int | None = None


class _Differences:
    """Finds what differs, and makes groups of it."""

    def __init__(self, one: _Side, other: _Side, ignored: Collection[str]) -> None:
        self._one = one
        self._other = other
        self._ignored = frozenset(ignored)
        self.result = Comparison()
        self._pairs: list[_Pair] = []
        self._wanted: tuple[dict[_Lane, dict[int, int]], dict[_Lane, dict[int, int]]] = ({}, {})
        self._groups: dict[tuple[str, str], tuple[int, Group]] = {}

    # --- first: which ---------------------------------------------------------------

    def find(self) -> None:
        """Align the rows."""
        empty = _Row()
        for lane in dict.fromkeys((*self._one.rows, *self._other.rows)):
            row, other = self._one.rows.get(lane, empty), self._other.rows.get(lane, empty)
            for at, to in aligned(row.keys, other.keys):
                self._look_at(lane, row, at, other, to)

    def _look_at(self, lane: _Lane, row: _Row, at: int | None, other: _Row, to: int | None) -> None:
        result = self.result
        if at is None or to is None:
            result.only_a += at is not None
            result.only_b += to is not None
            self._keep(lane, at, to, 0)
            return
        flags = row.flags[at] | other.flags[to]
        is_same = row.wholes[at] == other.wholes[to]
        if is_same and not flags & _ANSWERED:
            result.unanswered += 1
            return
        result.compared += 1
        result.partial += bool(flags & (_PARTIAL | _NO_READS | _NO_WRITES))
        for name, left_out in (("read", _NO_READS), ("write", _NO_WRITES)):
            rows = [getattr(each, name) for each in (row, other)]
            is_same = is_same and (bool(flags & left_out) or rows[0][at] == rows[1][to])
        if not is_same:
            result.different += 1
            self._keep(lane, at, to, flags)

    def _keep(self, lane: _Lane, at: int | None, to: int | None, flags: int) -> None:
        if len(self._pairs) >= MAX_DETAILED:
            return
        for place, wanted in zip((at, to), self._wanted, strict=True):
            if place is not None:
                wanted.setdefault(lane, {})[place] = len(self._pairs)
        self._pairs.append(_Pair(flags, at is not None, to is not None))

    # --- then: in what -----------------------------------------------------------------

    def group(self) -> None:
        """Look at what differs, field by field."""
        for number, request in self._one.chosen(self._wanted[0]):
            pair = self._pairs[number]
            event = request.event
            pair.where, pair.time = request.where, request.trap.time
            pair.seq_a = event.seq
            if not pair.other:
                self._add(ONLY_IN_A, pair, request)
                continue
            pair.digests = self._one.digests(request, pair.flags)
            if number < _MAX_REMEMBERED:
                pair.shown = [_shown(request, name) for name in FIELDS]
        for number, request in self._other.chosen(self._wanted[1]):
            pair = self._pairs[number]
            pair.seq_b = request.event.seq
            if pair.digests is None:
                pair.where, pair.time = request.where, request.trap.time
                self._add(ONLY_IN_B, pair, request)
                continue
            self._compare(pair, request, pair.digests, self._other.digests(request, pair.flags))
        groups = sorted(self._groups.values(), key=lambda each: each[0])
        self.result.groups = [group for _, group in groups]

    def _compare(
        self, pair: _Pair, request: Request, one: "array[int]", other: "array[int]"
    ) -> None:
        differing = [
            place
            for place, name in enumerate(FIELDS)
            if name not in self._ignored and one[place] != other[place]
        ]
        asked, registers = FIELDS.index("request"), FIELDS.index(REGISTERS)
        for place in differing:
            # What is asked is in the registers.
            if place == registers and asked in differing:
                continue
            shown = "" if pair.shown is None else pair.shown[place]
            self._add(FIELDS[place], pair, request, shown)

    def _add(self, field: str, pair: _Pair, request: Request, shown: str = "") -> None:
        found = self._groups.get((pair.where, field))
        if found is not None:
            found[1].count += 1
            if found[0] <= pair.time:
                return
        elif len(self._groups) >= _MAX_GROUPS:
            return
        a, b = shown, _shown(request, field) if shown else ""
        if field == REGISTERS:
            a, b = _differing_words(a, b)
        group = Group(
            pair.where,
            field,
            1 if found is None else found[1].count,
            request.event.vm[:_MAX_SHOWN],
            request.event.vcpu,
            pair.seq_a,
            pair.seq_b,
            a,
            b,
        )
        self._groups[pair.where, field] = pair.time, group


def compare(
    one: RecordingReader,
    other: RecordingReader,
    *,
    selection: Selection,
    rename: Mapping[str, str],
    ignored: Collection[str] = (),
) -> Comparison:
    """Compare A, which is `one`, with B.

    `rename` gives VMs of A other names, `ignored` are fields that do not count. What one of the
    recordings was redacted of is left out of both. Raises `RecordingReadError` for a file that is
    no recording, or too large.
    """
    rules: dict[RedactionRule, None] = {}
    for reader in (one, other):
        for _, message in reader.messages(SESSION):
            if isinstance(message, Session) and len(rules) < _MAX_RULES:
                rules.update(dict.fromkeys(message.redaction))
    key = token_bytes(16)
    first = _Side(one, selection, Changes(rename, rules, 0), ignored, key)
    second = _Side(other, selection, Changes({}, rules, 0), ignored, key)
    for side in (first, second):
        side.read()
    differences = _Differences(first, second, ignored)
    differences.find()
    differences.result.problems = one.problem_count + other.problem_count
    differences.group()
    return differences.result


def _shown(request: Request, field: str) -> str:
    text = shown_field(request, field)
    # Registers are as many as the architecture has.
    return text if field == REGISTERS else _short(text)


def _differing_words(a: str, b: str) -> tuple[str, str]:
    """What differs of two texts with the same number of words, as those of registers."""
    pairs = [pair for pair in zip(a.split(), b.split(), strict=False) if pair[0] != pair[1]]
    return " ".join(one for one, _ in pairs), " ".join(other for _, other in pairs)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
