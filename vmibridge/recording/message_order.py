"""Messages that come in any order, given back in the order of the recording.

JSON lines have a trap where its reply was: a request may take hours, so its trap would have to wait
for as many lines. They wait in a temporary database on disk, of which few pages are in memory.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any, Self

import msgspec

from vmibridge.errors import RecordingError
from vmibridge.recording.file.reader import MAX_MESSAGE, TimedMessage
from vmibridge.recording.messages import RecordedMessage

__all__ = ["MAX_PLACE", "MessageOrder"]

MAX_PLACE = (1 << 63) - 1
_BATCH = 256
"""Messages that are handed to the database at a time."""
_BATCH_BYTES = 4 << 20


class MessageOrder:
    """`with` it; add all, then iterate once. Each call raises `RecordingError` where the temporary
    file cannot be written."""

    def __init__(self) -> None:
        # Without a name: a file that is gone with this process.
        self._database = sqlite3.connect("", isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = OFF")
            self._database.execute("CREATE TABLE m (place INTEGER PRIMARY KEY, kind INTEGER, body)")
            self._database.execute("BEGIN")
        except sqlite3.Error as error:
            self._database.close()
            raise RecordingError(f"a temporary file: {error}") from error
        self._kinds: dict[type[RecordedMessage], int] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._batch: list[tuple[int, int, bytes]] = []
        self._bytes = 0
        self.next_place: int = 0
        """Behind all that were added."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, place: int, time: int, message: RecordedMessage) -> None:
        """Take a message, whose place is 0 to `MAX_PLACE` and its own; its time has 64 bits.

        Raises `ValueError` for a message that is too large for a recording, and for a place that
        another one has, which may be known later only, with the next ones. Raises `OverflowError`
        for a number of the message above 64 bits.
        """
        body = time.to_bytes(8, "little") + self._encode(message)
        if len(body) - 8 > MAX_MESSAGE:
            raise ValueError(f"a message has {len(body) - 8} bytes, {MAX_MESSAGE} is the most")
        kind = self._kinds.setdefault(type(message), len(self._kinds))
        self._batch.append((place, kind, body))
        self._bytes += len(body)
        self.next_place = max(self.next_place, place + 1)
        if len(self._batch) >= _BATCH or self._bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what is collected to the database. Raises as `add`."""
        try:
            self._database.executemany("INSERT INTO m VALUES (?, ?, ?)", self._batch)
        except sqlite3.IntegrityError:
            raise ValueError("two lines have the same place") from None
        except sqlite3.Error as error:
            raise RecordingError(f"a temporary file: {error}") from error
        self._batch.clear()
        self._bytes = 0

    def __iter__(self) -> Iterator[TimedMessage]:
        """All of them, by place. Raises as `add`."""
        self.flush()
        decoders: list[msgspec.msgpack.Decoder[Any]] = [
            msgspec.msgpack.Decoder(kind) for kind in self._kinds
        ]
        try:
            for kind, body in self._database.execute("SELECT kind, body FROM m ORDER BY place"):
                time = int.from_bytes(body[:8], "little")
                yield TimedMessage(time, decoders[kind].decode(memoryview(body)[8:]))
        except sqlite3.Error as error:
            raise RecordingError(f"a temporary file: {error}") from error
