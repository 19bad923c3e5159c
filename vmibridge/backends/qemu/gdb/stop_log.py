"""A `stop` by QMP while the VM is at a breakpoint: QEMU drops it, but its log shows it.

The VM stands still then already, so QEMU does nothing, and the monitors' other users see no event.
But QEMU can log the commands of QMP as they come. The host asks it to, and pauses the VM itself.
"""

import logging
import os
from pathlib import Path

from vmibridge.errors import BackendError

log: logging.Logger = logging.getLogger(__name__)

_STOP, _CONT, _HUMAN = b"qmp_enter_stop", b"qmp_enter_cont", b"qmp_enter_human_monitor_command"
_MAX_BYTES = 1 << 20
"""Bytes of a line that are read."""


class StopLog:
    """Reads QEMU's log. Raises `BackendError` when the file cannot be opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            Path(path).touch()
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BackendError(f"{path}: {error.strerror}") from error
        self._at = os.fstat(self._file).st_size
        self._rest = b""
        self._is_stopped = False

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    @property
    def commands(self) -> list[str]:
        """The command for QEMU's monitor."""
        names = (_STOP, _CONT, _HUMAN)
        return [f"logfile {self.path}", *(f"trace-event {name.decode()} on" for name in names)]

    def wants_pause(self) -> bool:
        """Whether the last command was a `stop`; costs one system call while there is none."""
        size = os.fstat(self._file).st_size
        if size != self._at:
            self._read(size)
        return self._is_stopped

    def _read(self, size: int) -> None:
        if size < self._at:
            # It was truncated, or opened again.
            self._at, self._rest = 0, b""
        data = self._rest + os.pread(self._file, min(size - self._at, _MAX_BYTES), self._at)
        self._at = min(size, self._at + _MAX_BYTES)
        *lines, self._rest = data.split(b"\n")
        self._rest = self._rest[-_MAX_BYTES:]
        for line in lines:
            if _HUMAN in line:
                word = line.partition(b'"command-line": "')[2].split(b'"')[0].strip()
                stops, goes_on = word in (b"stop", b"s"), word in (b"cont", b"c")
            else:
                stops, goes_on = _STOP in line, _CONT in line
            if stops or goes_on:
                self._is_stopped = stops
