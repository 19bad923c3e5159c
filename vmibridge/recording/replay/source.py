"""The VMs of a recording that are replayed, read in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.errors import BackendSpecError, RecordingReadError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage, taken_apart
from vmibridge.recording.messages import (
    SESSION,
    TRAP,
    Note,
    PlainTrap,
    PlainTraps,
    RecordedMessage,
    Reply,
    Session,
)
from vmibridge.vm.trap import TrapEvent

__all__ = ["RecordedVms", "all_apart"]

_BATCH = 4096
"""Messages that are read at a time."""
_BATCH_BYTES = 8 << 20
"""The same in bytes: a batch ends with the chunk that goes beyond."""
_MAX_SEQ = (1 << 40) - 1
"""What is above it in a number counts retries that a replay made up (`request`)."""


class RecordedVms:
    """The messages of some VMs of a recording, in the order of the file. `close` frees it."""

    def __init__(self, path: Path) -> None:
        """Raises `RecordingReadError` for a file that is not a recording."""
        self.reader: RecordingReader = RecordingReader(path)
        self._path = path
        self._names: set[str] = set()
        self._times = 1
        self._messages: Iterator[TimedMessage | PlainTraps] | None = None

    def close(self) -> None:
        """Free the file."""
        self.reader.close()

    def play(self, times: int) -> None:
        """Read the one VM so often, one time after another, before anything is read; 0: without an
        end.

        Each time has numbers and times of its own, behind those before. Of several runs of the VM
        the first is read."""
        self._times = times

    def find(self, wanted: str | None) -> tuple[str, Session | None]:
        """Have the VM of this name read, too; without one, the first. Before anything is read.

        Returns its name, and what served it then, if the file tells. Raises `RecordingReadError`
        for a recording that has no trap, `BackendSpecError` for a VM that is not in it.
        """
        names: dict[str, None] = {}
        for _, message in self.reader.messages(*([SESSION] if wanted else [SESSION, TRAP])):
            name = message.vm
            assert name is not None
            if wanted in (None, name):
                self._names.add(name)
                return name, message if isinstance(message, Session) else None
            names[name] = None
        if wanted is None:
            why = f"{self._path}: there is no trap in it"
            if (advice := self.reader.advice) is not None:
                why += f"; {advice}"
            raise RecordingReadError(why)
        if names:
            raise BackendSpecError(
                f"replay:{self._path}: has no VM {wanted!r}; there are {', '.join(names)}"
            )
        # The sessions are lost: its traps may be there.
        self._names.add(wanted)
        return wanted, None

    async def read_on(self) -> list[TimedMessage | PlainTrap]:
        """The next messages and plain traps; none at the end. Read in a thread, whose end a
        cancellation awaits."""
        return await in_own_thread(self._read_batch)

    def _read_batch(self) -> list[TimedMessage | PlainTrap]:
        if self._messages is None:
            self._messages = self._of_vms() if self._times == 1 else self._rounds()
        most = self.reader.bytes_unpacked + _BATCH_BYTES
        batch: list[TimedMessage | PlainTrap] = []
        for each in self._messages:
            self._add(batch, each)
            if len(batch) >= _BATCH or self.reader.bytes_unpacked > most:
                break
        # What tells that a trap is a retry, or was denied or queued, stands right behind it.
        while batch and _is_trap(batch[-1]):
            further = next(self._messages, None)
            if further is None:
                break
            self._add(batch, further)
        return batch

    def _add(self, batch: list[TimedMessage | PlainTrap], each: TimedMessage | PlainTraps) -> None:
        if not isinstance(each, PlainTraps):
            batch.append(each)
            return
        names = self._names
        batch += [plain for plain in each.traps if plain.event.vm in names]

    def _of_vms(self) -> Iterator[TimedMessage | PlainTraps]:
        names = self._names
        return (
            each
            for each in self.reader.messages_of_file()
            if isinstance(each, PlainTraps) or each.message.vm in names
        )

    def _first_run(self) -> Iterator[TimedMessage]:
        has_begun = False
        for each in self.reader.messages():
            if each.message.vm not in self._names:
                continue
            if has_begun and isinstance(each.message, Session):
                return
            has_begun = True
            yield each

    def _rounds(self) -> Iterator[TimedMessage]:
        by = later = played = 0
        while played < self._times or not self._times:
            highest = first = last = 0
            for time, message in self._first_run():
                if isinstance(message, Session):
                    if not played:
                        yield TimedMessage(time, message)
                    continue
                if isinstance(message, TrapEvent):
                    highest = max(highest, message.seq & _MAX_SEQ)
                first, last = first or time, time
                yield TimedMessage(time + later, _renumbered(message, by))
            if not highest:
                return
            played += 1
            by += highest
            later += last - first + 1


def all_apart(batch: Sequence[TimedMessage | PlainTrap]) -> list[TimedMessage | PlainTrap]:
    """The same with each plain trap as its trap and its reply."""
    found: list[TimedMessage | PlainTrap] = []
    for each in batch:
        if isinstance(each, PlainTrap):
            found += taken_apart(each)
        else:
            found.append(each)
    return found


def _is_trap(each: TimedMessage | PlainTrap) -> bool:
    return not isinstance(each, PlainTrap) and isinstance(each.message, TrapEvent)


def _renumbered(message: RecordedMessage, by: int) -> RecordedMessage:
    if not by or isinstance(message, Session):
        return message
    changes: dict[str, int] = {}
    if message.seq is not None:
        changes["seq"] = message.seq + by
    if isinstance(message, Note | Reply) and message.retry_of is not None:
        changes["retry_of"] = message.retry_of + by
    return msgspec.structs.replace(message, **changes)
