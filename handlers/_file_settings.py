"""The folder that a handler of files has: its settings, and its life with the handler."""

import errno
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from vmibridge.errors import ConfigError, ServerStateError
from vmibridge.handlers._file_budget import Limits, failure
from vmibridge.handlers._file_store import MAX_OPEN, Store

__all__ = ["FolderSettings", "OpenFolder"]

R = TypeVar("R")

_THREADS = 4
"""That are at the files of one guest at a time; not those of the other handlers."""


class FolderSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which folder, and how much. Raises `ValueError` if a value is out of range."""

    folder: str | None = None
    """The folder, which exists. Without one nothing is allowed."""
    max_file: int = 1 << 30
    """Bytes of one file, at most."""
    max_bytes: int = 4 << 30
    """Bytes of all files that the guest has put since the server was started, at most; what the
    host has taken out of the folder does not count."""
    max_files: int = 10_000
    """Files and folders of the same kind, at most."""
    max_open: int = 64
    """Files that may be under way at a time."""
    idle_timeout: float = 600.0
    """Seconds after which an unused file is given up when another one is begun."""
    sync: bool = True
    """Whether the end of a file waits until it is on the disk."""

    def __post_init__(self) -> None:
        if self.folder is not None and (not self.folder or "\0" in self.folder):
            raise ValueError(f"folder is the path of a folder, got {self.folder!r}")
        for name in ("max_file", "max_bytes", "max_files"):
            if not 1 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} is 1 to 2**63-1, got {getattr(self, name)!r}")
        if not 1 <= self.max_open <= MAX_OPEN:
            raise ValueError(f"max_open is 1 to {MAX_OPEN}, got {self.max_open!r}")
        if not self.idle_timeout > 0:
            raise ValueError(
                f"idle_timeout is a positive number of seconds, got {self.idle_timeout!r}"
            )


class OpenFolder:
    """The store of one handler, from its `__aenter__` to its `__aexit__`."""

    def __init__(self, handler: str, settings: FolderSettings) -> None:
        self._handler = handler
        self._settings = settings
        self._limiter = anyio.CapacityLimiter(_THREADS)
        self._is_open = False
        self._store: Store | None = None

    async def open(self) -> None:
        """Open the folder, and remove what a host that was killed has left there.

        Raises `ConfigError` where it cannot be opened. If cancelled, nothing is open.
        """
        folder = self._settings.folder
        if folder is not None:
            try:
                await anyio.to_thread.run_sync(self._open, folder)
            except OSError as error:
                raise ConfigError(
                    f"{self._handler}: folder {folder!r}: {error.strerror}"
                ) from error
        self._is_open = True

    def _open(self, folder: str) -> None:
        settings = self._settings
        limits = Limits(
            settings.max_file,
            settings.max_bytes,
            settings.max_files,
            settings.max_open,
            settings.idle_timeout,
        )
        self._store = Store(folder, limits, sync=settings.sync)

    async def close(self) -> None:
        """Remove what is under way, also while being cancelled."""
        self._is_open = False
        store, self._store = self._store, None
        if store is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(store.close)

    async def run(self, operation: Callable[[Store], R]) -> R:
        """Do it in a thread: as a whole, also where the request is cancelled meanwhile.

        Raises `OSError` with the number that the guest is told, EACCES where there is no folder.
        """
        return await anyio.to_thread.run_sync(operation, self._opened(), limiter=self._limiter)

    def run_now(self, operation: Callable[[Store], R]) -> R:
        """Do it here: it is not to wait for anything. Raises as `run`."""
        return operation(self._opened())

    def _opened(self) -> Store:
        if not self._is_open:
            raise ServerStateError(
                f"the handler {self._handler} answers between __aenter__ and __aexit__"
            )
        if self._store is None:
            raise failure(errno.EACCES)
        return self._store
