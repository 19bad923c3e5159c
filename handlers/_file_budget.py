"""How much a guest may put into a folder."""

import errno
import os
import time
from collections.abc import Callable
from threading import Lock

import msgspec

from vmibridge.handlers._file_folder import Folder

__all__ = ["Budget", "Limits", "failure"]


def failure(number: int) -> OSError:
    """An error of the system with this number."""
    return OSError(number, os.strerror(number))


class Limits(msgspec.Struct, frozen=True):
    """What a guest may have. The settings of a handler say and check it."""

    max_file: int
    """Bytes of a file."""
    max_bytes: int
    """Bytes of all files that it has put, and of those under way."""
    max_files: int
    """Files and folders that it has put, and files under way."""
    max_open: int
    """Transfers under way."""
    idle_timeout: float
    """Seconds."""


class Budget:
    """What a guest has put, and what is reserved for files under way. May be used in any thread.

    Files that the host has taken out of the folder do not count: they are looked for when a limit
    is reached, at most once a second. A file that is replaced counts once.
    """

    def __init__(
        self, limits: Limits, folder: Folder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._folder = folder
        self._clock = clock
        self._lock = Lock()
        self._put: dict[tuple[str, ...], int] = {}
        self._bytes = 0
        self._open_bytes = 0
        self._open_files = 0
        self._next_look = float("-inf")

    def reserve(self, size: int, folders: int = 0) -> None:
        """Begin a file, with so many new folders on the way. Raises `OSError`: EFBIG, EDQUOT."""
        if size > self._limits.max_file:
            raise failure(errno.EFBIG)
        with self._lock:
            if self._is_over(size, folders):
                self._look()
                if self._is_over(size, folders):
                    raise failure(errno.EDQUOT)
            self._open_bytes += size
            self._open_files += 1

    def release(self, size: int) -> None:
        """A file that was begun is gone."""
        with self._lock:
            self._open_bytes -= size
            self._open_files -= 1

    def keep(self, parts: tuple[str, ...], size: int) -> None:
        """A file that was begun has its name."""
        self.release(size)
        with self._lock:
            for end in range(1, len(parts)):
                self._put.setdefault(parts[:end], 0)
            self._bytes += size - self._put.get(parts, 0)
            self._put[parts] = size

    def _is_over(self, size: int, folders: int) -> bool:
        return (
            self._bytes + self._open_bytes + size > self._limits.max_bytes
            or len(self._put) + self._open_files + folders + 1 > self._limits.max_files
        )

    def _look(self) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + 1
        for parts, size in list(self._put.items()):
            try:
                self._folder.look_up(parts)
            except (FileNotFoundError, NotADirectoryError):
                del self._put[parts]
                self._bytes -= size
            except OSError:
                continue
