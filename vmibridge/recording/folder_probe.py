"""Whether a folder takes recordings, before there is one to be made: by writing to it.

A server of agents makes a recording when a VM comes. What that VM would find, the probe finds
before: at the start, and then over and over while the server runs, so that a check of
its health waits for no disk.

| a probe finds | `hindrance` | tried again |
|---|---|---|
| room | `None` | 5 s later |
| no room, or a quota that is used up | `disk full`, as of a recording there | 1 s later |
| another error, such as a volume that is read-only now | `not recording` | 1 s later |
| nothing within 5 s, as of a file server that is away | `not recording` | when it has ended |

A probe writes as many bytes as a recording takes at once, into a file that has no name where the
system has such, and that is gone when the probe is done.
"""

import errno
import logging
import tempfile
from pathlib import Path

import anyio

from vmibridge.aio.own_thread import in_left_thread
from vmibridge.engine.taps import Hindrance
from vmibridge.errors import RecordingError
from vmibridge.recording.chunked import NO_ROOM

__all__ = ["FolderProbe"]

log: logging.Logger = logging.getLogger(__name__)

_SIZE = 64 << 10
"""Bytes: a header, sessions and a few hundred traps."""
_EVERY = 5.0
_AGAIN = 1.0
"""Seconds between two probes, after one that found room, and after one that did not."""
_PATIENCE = 5.0
"""Seconds for a probe, until it counts as one that failed."""


class FolderProbe:
    """`holds_guests`: whether VMs wait where there is no room, or go on unrecorded."""

    def __init__(self, folder: Path, *, holds_guests: bool) -> None:
        """Makes the folder, and probes it. Blocking.

        Raises `RecordingError` where it takes none for another reason than room.
        """
        self.hindrance: Hindrance | None = None
        """Why the folder takes no recording right now; `None`: it does."""
        self._folder = folder
        self._holds_guests = holds_guests
        self.make_folder()
        if (error := self._probe()) is None:
            return
        if error.errno not in NO_ROOM:
            raise RecordingError(f"{folder}: {error.strerror}") from error
        self._found(error)

    def make_folder(self) -> None:
        """For a recording that is to be made there. Raises `RecordingError`."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordingError(f"{self._folder}: {error.strerror}") from error

    async def watch(self) -> None:
        """Probe for ever. If cancelled, leaves a probe that hangs behind."""
        while True:
            await anyio.sleep(_EVERY if self.hindrance is None else _AGAIN)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._give_up)
                found = await in_left_thread(self._probe)
                tasks.cancel_scope.cancel()
            self._found(found)

    async def _give_up(self) -> None:
        await anyio.sleep(_PATIENCE)
        self._found(TimeoutError(errno.ETIMEDOUT, f"takes nothing for {_PATIENCE:g} s"))

    def _probe(self) -> OSError | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                left = _SIZE
                while left:  # a volume that becomes full takes a part
                    left -= file.write(bytes(left))
        except OSError as error:
            return error
        return None

    def _found(self, error: OSError | None) -> None:
        before, self.hindrance = self.hindrance, self._hindrance_of(error)
        now = self.hindrance
        if now is None:
            if before is not None:
                log.warning("%s: takes recordings again", self._folder)
        elif before is None or before.kind != now.kind:
            are = "are held until there is room"
            if now.kind != "disk full":
                are = "cannot be recorded"
            elif not self._holds_guests:
                are = "run unrecorded until there is room"
            log.error("%s: VMs that come %s", now.why, are)

    def _hindrance_of(self, error: OSError | None) -> Hindrance | None:
        if error is None:
            return None
        why = f"{self._folder}: {error.strerror}"
        if error.errno in NO_ROOM:
            return Hindrance("disk full", why, self._holds_guests)
        # A VM that cannot be recorded at all is refused, whatever was to become of it later.
        return Hindrance("not recording", why, holds_guests=True)
