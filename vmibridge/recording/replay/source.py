"""One VM of a recording, read in batches."""

from collections.abc import Iterator
from pathlib import Path

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.errors import BackendSpecError, RecordingReadError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import SESSION, TRAP, Session
from vmibridge.vm.trap import TrapEvent

__all__ = ["RecordedVm"]

_BATCH = 4096
"""Messages that are read at a time."""
_BATCH_BYTES = 8 << 20
"""The same in bytes: a batch ends with the chunk that goes beyond."""


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
        self._messages: Iterator[TimedMessage] = self.reader.messages()

    @property
    def name(self) -> str:
        """The name of the VM in the recording."""
        assert self._name is not None
        return self._name

    def close(self) -> None:
        """Free the file."""
        self.reader.close()

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
            if each.message.vm == self._name:
                batch.append(each)
                if len(batch) >= _BATCH or self.reader.bytes_unpacked > most:
                    break
        # What tells that a trap is a retry, or was denied, stands right behind it.
        while batch and isinstance(batch[-1].message, TrapEvent):
            further = next((each for each in self._messages if each.message.vm == self._name), None)
            if further is None:
                break
            batch.append(further)
        return batch
