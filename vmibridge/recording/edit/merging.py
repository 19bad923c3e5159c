"""Several recordings as one stream of messages, by their times; each keeps its own order.

A VM is in one of them, unless they are parts of one recording (`recording.rotation`): those are
joined, and then the session, the traps that were open and the notes about them are there once.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import Note, Reply, Session, Step
from vmibridge.recording.vm_names import VmNames
from vmibridge.vm.trap import TrapEvent

__all__ = ["merged"]

_MAX_OPEN = 65_536
"""Traps without a reply that are remembered."""


class _Placed(NamedTuple):
    source: int
    timed: TimedMessage


def merged(readers: Sequence[RecordingReader]) -> Iterator[TimedMessage]:
    """The messages of all of them. Raises `RecordingReadError` as they do, and `ConfigError` where
    two have a VM of the same name."""
    if len(readers) == 1:
        return readers[0].messages()
    streams = [_placed(number, reader) for number, reader in enumerate(readers)]
    return _Join(readers).messages(merge(*streams, key=_when))


def _when(placed: _Placed) -> tuple[int, bool]:
    """What comes first of several recordings. That a handler was queued is recorded with what comes
    next, such as the trap of another VM, and has its time (`recording.steps`)."""
    time, message = placed.timed
    return time, not (isinstance(message, Step) and message.kind == "queued")


def _placed(number: int, reader: RecordingReader) -> Iterator[_Placed]:
    for timed in reader.messages():
        yield _Placed(number, timed)


class _Join:
    """Leaves out what a part has of the one before it."""

    def __init__(self, readers: Sequence[RecordingReader]) -> None:
        self._readers = readers
        self._names = VmNames()
        self._sessions: dict[str, Session] = {}
        self._sources: dict[str, set[int]] = {}
        """Where a VM is: in one, or in the parts of one recording."""
        self._open: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._begun: set[str] = set()
        """VMs whose session was left out just now: a note may follow it."""

    def messages(self, placed: Iterable[_Placed]) -> Iterator[TimedMessage]:
        for source, timed in placed:
            if self._is_new(source, timed):
                yield timed

    def _is_new(self, source: int, timed: TimedMessage) -> bool:
        message = timed.message
        if message.vm is None:
            return True
        if isinstance(message, Session):
            return self._begin(source, message)
        # A VM without a session may be in one recording only, too.
        vm = self._names.once(message.vm)
        sources = self._sources.setdefault(vm, {source})
        if source not in sources:
            raise self._twice(vm, min(sources), source)
        is_first = vm in self._begun
        self._begun.discard(vm)
        if isinstance(message, Note):
            if message.kind != "lost":
                return True
            if message.seq is None:
                # Of the traps that are in the part before.
                return not is_first
            return (message.vm, message.seq) not in self._open or message.retry_of is not None
        if isinstance(message, TrapEvent):
            key = (vm, message.seq)
            if key in self._open and len(sources) > 1:
                return False
            self._open[key] = None
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        elif isinstance(message, Reply):
            self._open.pop((message.vm, message.seq), None)
        return True

    def _begin(self, source: int, session: Session) -> bool:
        vm = self._names.once(session.vm)
        before = self._sessions.get(vm)
        sources = self._sources.setdefault(vm, {source})
        # Its handlers may be many.
        self._sessions[vm] = Session(vm, started=session.started[:100], part=session.part)
        if source in sources:
            return True
        if (
            before is None
            or session.started[:100] != before.started
            or not session.started
            or session.part <= before.part
        ):
            raise self._twice(vm, min(sources), source)
        sources.add(source)
        self._begun.add(vm)
        return False

    def _twice(self, vm: str, first: int, second: int) -> ConfigError:
        paths = [str(self._readers[number].path) for number in (first, second)]
        return ConfigError(
            f"{paths[1]}: has a VM {vm[:80]!a}, and so has {paths[0]}; give it another name first:"
            f" vmibridge edit {paths[1]} --rename OLD=NEW -o FILE"
        )
