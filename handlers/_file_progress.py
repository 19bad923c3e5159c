"""A file under way: what is there of its bytes, and of its SHA-256."""

import errno
import hashlib
import os
from bisect import bisect_left, bisect_right
from threading import Lock

import msgspec

from vmibridge.handlers._file_budget import failure
from vmibridge.handlers._file_ends import Caller
from vmibridge.handlers._file_folder import IfTaken, Temporary

__all__ = ["Pieces", "Put", "RunningHash", "Transfer"]

MAX_PIECES = 1024
"""Pieces with gaps between them: a guest that wants more fills a gap first."""
_STEP = 1 << 20
"""Bytes that are hashed at a time."""


class Pieces:
    """Which bytes of a file are there."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def first(self) -> int:
        """Bytes that are there from the beginning, without a gap."""
        return self._ends[0] if self._starts[:1] == [0] else 0

    def check(self, start: int, end: int) -> None:
        """Raise `OSError` (ENOBUFS) where this would be one piece too many."""
        low, high = self._touched(start, end)
        if low == high and len(self._starts) >= MAX_PIECES:
            raise failure(errno.ENOBUFS)

    def add(self, start: int, end: int) -> None:
        """These bytes are there now."""
        low, high = self._touched(start, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        """The pieces that these bytes overlap or lengthen: from one number to before another."""
        return bisect_left(self._ends, start), bisect_right(self._starts, end)


class RunningHash:
    """SHA-256 of a file, as far as it is there. May be used in any thread."""

    def __init__(self, descriptor: int) -> None:
        self._lock = Lock()
        self._descriptor: int | None = descriptor
        self._at = 0
        self._digest = hashlib.sha256()

    def forget(self) -> None:
        """Begin again: what was hashed is no longer what is there."""
        with self._lock:
            self._at = 0
            self._digest = hashlib.sha256()

    def go_on(self, end: int) -> bool:
        """Take some more bytes, up to this offset; returns whether any are left to take."""
        with self._lock:
            if self._descriptor is None or self._at >= end:
                return False
            data = os.pread(self._descriptor, min(_STEP, end - self._at), self._at)
            self._digest.update(data)
            self._at += len(data)
            return bool(data) and self._at < end

    def finish(self, end: int) -> bytes:
        """The hash of so many bytes. Raises `OSError` (EIO) where the file is shorter by now."""
        while self.go_on(end):
            pass
        with self._lock:
            if self._at != end:
                raise failure(errno.EIO)
            return self._digest.digest()

    def close(self) -> None:
        """The file is about to be closed."""
        with self._lock:
            self._descriptor = None


class Put(msgspec.Struct, frozen=True):
    """What is known of a file that a guest puts."""

    temporary: Temporary
    parts: tuple[str, ...]
    if_taken: IfTaken


class Transfer:
    """A file under way. What is below `lock` belongs to who holds it."""

    def __init__(self, key: object, size: int, descriptor: int, hashes: bool) -> None:
        self.key = key
        self.size = size
        """Bytes."""
        self.hashes = hashes
        """A hash is expected at its end, so it is hashed meanwhile."""
        self.handle = 0
        self.owner = Caller(0)
        self.used = 0.0
        self.is_hashing = False

        self.lock = Lock()
        self.is_open = True
        self.descriptor = descriptor
        self.hash = RunningHash(descriptor)
        self.pieces = Pieces()
        self.put: Put | None = None
        """`None`: the guest gets it."""
