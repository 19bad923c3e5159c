"""A file of outcomes that does not grow for ever.

When it has no room for a line, it becomes FILE.1, in the place of the one before, and FILE begins
anew. So there are two, and each line is whole in one of them.
"""

import os
from pathlib import Path

from vmibridge.errors import BackendError
from vmibridge.files import reason, replaceable

__all__ = ["OutcomeFile"]


class OutcomeFile:
    """`max_size` bytes are the most that it has; `None`: it has no bound.

    Raises `BackendError` when it cannot be written, or with a bound is not a regular file.
    """

    def __init__(self, path: Path, max_size: int | None) -> None:
        self._max_size = max_size
        try:
            # A link stays; behind it the files take turns.
            self._path = path if max_size is None else replaceable(path)
            self.fd: int = self._open()
        except OSError as error:
            raise BackendError(f"{path}: cannot be written: {reason(error, path)}") from error

    def make_room(self, size: int) -> None:
        """Begin anew where a line of `size` bytes has no room. Raises `OSError`; the next call
        goes on from there."""
        if self._max_size is None:
            return
        so_far = os.fstat(self.fd).st_size
        if not so_far or so_far + size <= self._max_size:
            return
        if self._path.exists():
            self._path.replace(replaceable(self._path.with_name(f"{self._path.name}.1")))
        new = self._open()
        # The number stays: others have it.
        os.dup2(new, self.fd, inheritable=False)
        os.close(new)

    def close(self) -> None:
        os.close(self.fd)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(self._path, flags, 0o666)
