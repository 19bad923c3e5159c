"""Which traps of a recording are asked for: "or" within a field, "and" between fields.

| field | takes a trap when |
|---|---|
| `requests` | its request has one of these codes, or a handler of one of these names took it |
| `methods` | its method has one of these codes, or one of these names by its session |
| `outcomes` | it ended so; `None` stands for a trap without a reply |
| `vcpus`, `vms` | it is of one of them |
| `first`, `last` | its sequence number is one of them or between; there are such of each VM |
| `since`, `until` | it was taken then or between; both ends count |

An empty field takes all.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Self

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.method_names import MethodNames
from vmibridge.recording.traps import RecordedTrap, ignored, recorded_traps
from vmibridge.vm.trap import TrapEvent

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|\d+")
_SECONDS = re.compile(r"\d+(\.\d*)?|\.\d+")


class Moment(NamedTuple):
    """A point in time."""

    nanoseconds: int
    relative: bool
    """Since the first trap of the recording; otherwise since the Unix epoch."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From seconds, or ISO 8601; UTC where it has no zone. Raises `ConfigError`."""
        try:
            if _SECONDS.fullmatch(text):
                # Of more digits than a float has, it is infinite, and `round` refuses it.
                return cls(round(float(text) * 1e9), relative=True)
            time = datetime.fromisoformat(text)
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
            # Without floats, which lose nanoseconds here.
            return cls((time - _EPOCH) // timedelta(microseconds=1) * 1000, relative=False)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"{text[:40]!r} is not a time: it is seconds since the first trap, as in 2.5, or"
                " ISO 8601, as in 2026-01-31T12:00:00Z"
            ) from None

    def after(self, start: int) -> int:
        """In nanoseconds since the Unix epoch."""
        return self.nanoseconds + (start if self.relative else 0)


class Selection(msgspec.Struct, frozen=True):
    """Some of the traps; by default all."""

    requests: frozenset[int | str] = frozenset()
    methods: frozenset[int | str] = frozenset()
    outcomes: frozenset[OutcomeKind | None] = frozenset()
    vcpus: frozenset[int] = frozenset()
    vms: frozenset[str] = frozenset()
    since: Moment | None = None
    until: Moment | None = None
    first: int | None = None
    last: int | None = None

    @classmethod
    def parse(
        cls,
        *,
        requests: Iterable[str] = (),
        methods: Iterable[str] = (),
        outcomes: Iterable[str] = (),
        vcpus: Iterable[int] = (),
        vms: Iterable[str] = (),
        since: str | None = None,
        until: str | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> Self:
        """From the words of a command line. Raises `ConfigError`."""
        return cls(
            frozenset(_code(text, "request") for text in requests),
            frozenset(_code(text, "method") for text in methods),
            frozenset(map(_outcome, outcomes)),
            frozenset(vcpus),
            frozenset(vms),
            None if since is None else Moment.parse(since),
            None if until is None else Moment.parse(until),
            first,
            last,
        )

    def takes(self, trap: RecordedTrap, start: int, method: str | None = None) -> bool:
        """Whether a trap is one of them. `start` is when the first of the recording was taken;
        `method` is the name of its method."""
        event, packet, reply = trap.event, trap.packet, trap.reply
        if self.requests and not (
            (packet is not None and packet.request in self.requests)
            or (reply is not None and reply.handler in self.requests)
        ):
            return False
        if self.methods and not (
            packet is not None and (packet.method in self.methods or method in self.methods)
        ):
            return False
        if self.outcomes and (None if reply is None else reply.kind) not in self.outcomes:
            return False
        if self.vcpus and event.vcpu not in self.vcpus:
            return False
        if self.vms and event.vm not in self.vms:
            return False
        if self.first is not None and event.seq < self.first:
            return False
        if self.since is not None and trap.time < self.since.after(start):
            return False
        return not self.is_behind(event.seq, trap.time, start)

    def is_behind(self, seq: int, time: int, start: int) -> bool:
        """Whether a trap was taken after all of them, so that none of its VM follows it."""
        if self.last is not None and seq > self.last:
            return True
        return self.until is not None and time > self.until.after(start)


class SelectedTraps:
    """One pass over the messages of a recording.

    `hear` gets each session and each note, `others` each message that belongs to no trap, with its
    place in the recording: what the selection says of VMs holds for it, and all but sessions and
    notes come only where it says nothing else. Neither gets the notes of retries in chunks that
    `reader` leaves out because they are before `since`.
    """

    def __init__(
        self,
        messages: Iterable[TimedMessage],
        selection: Selection,
        hear: Callable[[Session | Note], object],
        others: Callable[[int, TimedMessage], object] = ignored,
        reader: RecordingReader | None = None,
    ) -> None:
        self._messages = messages
        self._reader = reader
        self._selection = selection
        self._hear = hear
        self._others = others
        self._names = MethodNames()
        self.start: int = 0
        """When the first trap of the recording was taken; known with the first trap."""

    def __iter__(self) -> Iterator[RecordedTrap]:
        """In the order of `recorded_traps`."""
        every = self._selection == Selection()
        for trap in self.every():
            if every or self.takes(trap):
                yield trap

    def every(self) -> Iterator[RecordedTrap]:
        """All traps, for who asks of each whether it is one of them (`takes`)."""
        every = self._selection == Selection()
        return recorded_traps(self._listen(), self._others if every else self._other)

    def takes(self, trap: RecordedTrap) -> bool:
        """Whether a trap of this pass is one of them."""
        return self._selection.takes(trap, self.start, self.method_of(trap))

    def method_of(self, trap: RecordedTrap) -> str | None:
        """The name of its method, where a session has one."""
        packet, reply = trap.packet, trap.reply
        if packet is None or reply is None:
            return None
        return self._names.name(trap.event.vm, reply.handler, packet.method)

    def _other(self, place: int, timed: TimedMessage) -> None:
        message, vms = timed.message, self._selection.vms
        if (isinstance(message, (Session, Note)) or self._selection == Selection(vms=vms)) and (
            not vms or message.vm is None or message.vm in vms
        ):
            self._others(place, timed)

    def _listen(self) -> Iterator[TimedMessage]:
        for timed in self._messages:
            message = timed.message
            if isinstance(message, (Session, Note)):
                if isinstance(message, Session):
                    self._names.learn(message)
                self._hear(message)
            elif not self.start and isinstance(message, TrapEvent):
                self.start = timed.time
                # Not before: times are told since the first trap.
                if self._reader is not None and self._selection.since is not None:
                    self._reader.skip_before = self._selection.since.after(self.start)
            yield timed


def _code(text: str, what: str) -> int | str:
    if not _NUMBER.fullmatch(text):
        return text
    try:
        code = int(text, 16 if text[:2] in ("0x", "0X") else 10)
    except ValueError:
        code = 1 << 16  # more digits than Python converts
    if code >> 16:
        raise ConfigError(f"{text[:40]!r} is no {what}: it has 16 bits, 0x0000 to 0xffff")
    return code


def _outcome(text: str) -> OutcomeKind | None:
    if text == "none":
        return None
    try:
        return OutcomeKind(text)
    except ValueError:
        words = ", ".join(kind.value for kind in OutcomeKind)
        raise ConfigError(f"{text!r} is not an outcome: there are {words} and none") from None
