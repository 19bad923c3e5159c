"""One VM of a recording, read in batches."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.errors import BackendSpecError, RecordingReadError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import (
    SESSION,
    TRAP,
    Note,
    RecordedMessage,
    Reply,
    Session,
)
from vmibridge.vm.trap import TrapEvent

__all__ = ["RecordedVm"]

_BATCH = 4096
"""Messages that are read at a time."""
_BATCH_BYTES = 8 << 20
"""The same in bytes: a batch ends with the chunk that goes beyond."""
_MAX_SEQ = (1 << 40) - 1
"""What is above it in a number counts retries that a replay made up (`request`)."""


class RecordedVm:
    """The messages of one VM of a recording. `close` frees the file."""

    def __init__(self, path: Path, name: str | None) -> None:
        """The VM of this name; without one, the first.

        Raises `RecordingReadError` for a file that is no recording, or has no trap, and
        `BackendSpecError` for a VM that is not in it.
        """
        self.session: Session | None = None
        """What served this VM then, if the file tells."""
        self.reader: RecordingReader = RecordingReader(path)
        self._path = path
        self._name = name
        try:
            self._find()
        except BaseException:  # whatever it is, no caller has this object to close it
            self.close()
            raise
        self._messages: Iterator[TimedMessage] = self._of_vm()

    @property
    def name(self) -> str:
        """The name of the VM in the recording."""
        assert self._name is not None
        return self._name

    def close(self) -> None:
        """Free the file."""
        self.reader.close()

    def play(self, rounds: int) -> None:
        """Read it so often, one time after another, before anything is read; 0: without an end.

        Each time has numbers and times of its own, behind those before. Of several runs of the VM
        the first is read."""
        if rounds != 1:
            self._messages = self._rounds(rounds)

    def _find(self) -> None:
        wanted = self._name
        names: dict[str, None] = {}
        for _, message in self.reader.messages(*([SESSION] if wanted else [SESSION, TRAP])):
            name = message.vm
            assert name is not None
            if wanted in (None, name):
                self._name = name
                self.session = message if isinstance(message, Session) else None
                return
            names[name] = None
        if wanted is None:
            raise RecordingReadError(f"{self._path}: there is no trap in it")
        if names:
            raise BackendSpecError(
                f"replay:{self._path}: has no VM {wanted!r}; there are {', '.join(names)}"
            )

    async def read_on(self) -> list[TimedMessage]:
        """The next messages; none at the end. Read in a thread, whose end a cancellation awaits."""
        return await in_own_thread(self._read_batch)

    def _read_batch(self) -> list[TimedMessage]:
        most = self.reader.bytes_unpacked + _BATCH_BYTES
        batch: list[TimedMessage] = []
        for each in self._messages:
            batch.append(each)
            if len(batch) >= _BATCH or self.reader.bytes_unpacked > most:
                break
        # What tells that a trap is a retry, or was denied, stands right behind it.
        while batch and isinstance(batch[-1].message, TrapEvent):
            further = next(self._messages, None)
            if further is None:
                break
            batch.append(further)
        return batch

    def _of_vm(self) -> Iterator[TimedMessage]:
        return (each for each in self.reader.messages() if each.message.vm == self._name)

    def _first_run(self) -> Iterator[TimedMessage]:
        has_begun = False
        for each in self._of_vm():
            if has_begun and isinstance(each.message, Session):
                return
            has_begun = True
            yield each

    def _rounds(self, rounds: int) -> Iterator[TimedMessage]:
        by = later = played = 0
        while played < rounds or not rounds:
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


def _renumbered(message: RecordedMessage, by: int) -> RecordedMessage:
    if not by or isinstance(message, Session):
        return message
    changes: dict[str, int] = {}
    if message.seq is not None:
        changes["seq"] = message.seq + by
    if isinstance(message, Note | Reply) and message.retry_of is not None:
        changes["retry_of"] = message.retry_of + by
    return msgspec.structs.replace(message, **changes)
