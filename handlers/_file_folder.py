"""A folder of the host that guests put files into and get files from: the only way to its files.

Invariants:

- Each part of a name is opened below the folder before it, and no symbolic link is followed: what
  somebody puts into the folder leads nowhere else. The folder itself may be reached by one.
- What a guest puts is written to a temporary file at the top of the folder, and gets its name at
  the end, by one call of the system: a name either leads to all of the bytes or is not there. A
  file that exists is replaced only where that was asked for, and else left as it is.
- A temporary file is locked for as long as its owner lives. One that nobody has locked is what a
  process left that was killed; `sweep` removes it. So several processes may share a folder.

Every call blocks, may be made in any thread, and raises `OSError` where the system does.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import NamedTuple

from vmibridge.handlers._file_names import RESERVED, is_part

__all__ = ["MAX_ENTRIES", "Entry", "Folder", "IfTaken", "Temporary"]

MAX_ENTRIES = 100_000
"""Files and folders of one folder that can be listed: they are sorted, so all are held at once."""

_TEMPORARY = re.compile(re.escape(RESERVED) + "[0-9a-f]{32}[.]part")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
# A FIFO that nobody writes to would hold who opens it.
_READ_FILE = _READ | os.O_NONBLOCK
_READ_FOLDER = _READ | os.O_DIRECTORY
_MAX_NUMBER = 999


class Entry(NamedTuple):
    """A file or a folder, as it was when it was looked at."""

    name: str
    size: int
    """Bytes; 0 for a folder."""
    changed: int
    """When the content was last changed: nanoseconds since the Unix epoch."""
    is_folder: bool


class Temporary(NamedTuple):
    """A file that has no name yet that a guest could know of."""

    descriptor: int
    name: str


class IfTaken(Enum):
    """What becomes of a file whose name is taken."""

    FAIL = 1
    REPLACE = 2
    BESIDE = 3
    """It gets a number in its name."""


class Folder:
    """A folder, by a descriptor. Raises `OSError` where it cannot be opened."""

    def __init__(self, path: str) -> None:
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._root)

    def sweep(self) -> int:
        """Remove what processes left that were killed; returns how many files that were."""
        with os.scandir(self._root) as found:
            names = [each.name for each in found if _TEMPORARY.fullmatch(each.name)]
        return sum(map(self._sweep_one, names))

    def _sweep_one(self, name: str) -> bool:
        try:
            # Not for reading alone: on NFS a lock needs a file that may be written.
            descriptor = os.open(name, _READ_FILE | os.O_RDWR, dir_fd=self._root)
        except OSError:
            return False
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return False
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=self._root)
        except OSError:
            # Its owner lives, or has just removed it.
            return False
        finally:
            os.close(descriptor)
        return True

    def make_temporary(self) -> Temporary:
        """An empty file to write to: for `publish` or `discard`."""
        while True:
            name = f"{RESERVED}{secrets.token_hex(16)}.part"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o666, dir_fd=self._root)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return Temporary(descriptor, name)
            except BlockingIOError:
                # A sweep of another process has it, which came before it was locked.
                pass
            except BaseException:  # cancelled, too: nothing of it may be left
                self.discard(Temporary(descriptor, name))
                raise
            os.close(descriptor)

    def discard(self, temporary: Temporary) -> None:
        """Close and remove it; never raises."""
        with suppress(OSError):
            os.unlink(temporary.name, dir_fd=self._root)
        with suppress(OSError):
            os.close(temporary.descriptor)

    def publish(
        self, temporary: Temporary, parts: tuple[str, ...], if_taken: IfTaken, *, sync: bool
    ) -> tuple[str, ...]:
        """Close it and give it this name, with the folders on the way; returns the one that it has.

        Raises `FileExistsError` and `IsADirectoryError` if the name is taken. With `sync` bytes and
        name are on the disk when it returns. When it raises, the temporary file is gone, and so are
        the folders that it made.
        """
        made: list[tuple[str, ...]] = []
        try:
            if sync:
                os.fsync(temporary.descriptor)
            self._make_folders(parts[:-1], made)
            with self._opened(parts[:-1]) as parent:
                name = self._name(temporary, parent, parts[-1], if_taken)
                if sync:
                    _sync_folder(parent)
        except BaseException:  # cancelled, too: nothing of it may be left
            self.discard(temporary)
            for folder in reversed(made):
                # Somebody else may have put something there.
                with suppress(OSError), self._opened(folder[:-1]) as parent:
                    os.rmdir(folder[-1], dir_fd=parent)
            raise
        os.close(temporary.descriptor)
        return (*parts[:-1], name)

    def _name(self, temporary: Temporary, parent: int, name: str, if_taken: IfTaken) -> str:
        if if_taken is IfTaken.REPLACE:
            os.rename(temporary.name, name, src_dir_fd=self._root, dst_dir_fd=parent)
            return name
        for beside in [name] if if_taken is IfTaken.FAIL else _numbered(name):
            try:
                # In contrast to a rename, a link fails where the name is taken.
                os.link(
                    temporary.name,
                    beside,
                    src_dir_fd=self._root,
                    dst_dir_fd=parent,
                    follow_symlinks=False,
                )
            except FileExistsError:
                continue
            with suppress(OSError):
                os.unlink(temporary.name, dir_fd=self._root)
            return beside
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _make_folders(self, parts: tuple[str, ...], made: list[tuple[str, ...]]) -> None:
        for end in range(1, len(parts) + 1):
            with self._opened(parts[: end - 1]) as parent, suppress(FileExistsError):
                os.mkdir(parts[end - 1], dir_fd=parent)
                made.append(parts[:end])

    def missing_folders(self, parts: tuple[str, ...]) -> int:
        """How many folders on the way to this name are not there.

        Raises `NotADirectoryError` where one of them is something else.
        """
        for end in range(1, len(parts)):
            try:
                with self._opened(parts[:end]):
                    pass
            except FileNotFoundError:
                return len(parts) - end
        return 0

    def open_file(self, parts: tuple[str, ...]) -> int:
        """A descriptor to read a file by. Raises `OSError` for what is no regular file."""
        with self._opened(parts[:-1]) as parent:
            descriptor = os.open(parts[-1], _READ_FILE, dir_fd=parent)
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except BaseException:  # cancelled, too: the descriptor has no other owner
            os.close(descriptor)
            raise
        return descriptor

    def look_up(self, parts: tuple[str, ...]) -> Entry:
        """What is at this name; with no parts the folder itself. Raises `OSError`."""
        if not parts:
            return Entry("", 0, os.fstat(self._root).st_mtime_ns, is_folder=True)
        with self._opened(parts[:-1]) as parent:
            found = _entry(parts[-1], os.lstat(parts[-1], dir_fd=parent))
        if found is None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return found

    def list(self, parts: tuple[str, ...], after: str = "") -> Iterator[Entry]:
        """The files and folders in a folder, in the order of their names, from behind one.

        Left out is what a guest could not ask for: names that are not allowed, links, devices.
        Raises `OSError`; `EFBIG` for more than `MAX_ENTRIES`.
        """
        with self._opened(parts) as folder:
            names: list[str] = []
            with os.scandir(folder) as found:
                for count, each in enumerate(found):
                    if count >= MAX_ENTRIES:
                        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
                    if each.name > after and is_part(each.name):
                        names.append(each.name)
            for name in sorted(names):
                with suppress(FileNotFoundError):
                    entry = _entry(name, os.lstat(name, dir_fd=folder))
                    if entry is not None:
                        yield entry

    @contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        """The descriptor of a folder below this one; with no parts its own."""
        descriptor = os.dup(self._root)
        try:
            for part in parts:
                try:
                    following = os.open(part, _READ_FOLDER, dir_fd=descriptor)
                except OSError as error:
                    # What Linux says of a symbolic link where a folder was asked for.
                    if error.errno == errno.ELOOP:
                        raise NotADirectoryError(
                            errno.ENOTDIR, os.strerror(errno.ENOTDIR)
                        ) from error
                    raise
                os.close(descriptor)
                descriptor = following
            yield descriptor
        finally:
            os.close(descriptor)


def _numbered(name: str) -> Iterator[str]:
    """`a.txt`, `a.1.txt`, `a.2.txt` and so on."""
    yield name
    stem, dot, suffix = name.rpartition(".")
    if not stem:
        stem, dot, suffix = name, "", ""
    for number in range(1, _MAX_NUMBER + 1):
        yield f"{stem}.{number}{dot}{suffix}"


def _sync_folder(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # A file system that syncs no folders.
        if error.errno != errno.EINVAL:
            raise


def _entry(name: str, found: os.stat_result) -> Entry | None:
    if stat.S_ISDIR(found.st_mode):
        return Entry(name, 0, found.st_mtime_ns, is_folder=True)
    if stat.S_ISREG(found.st_mode):
        return Entry(name, found.st_size, found.st_mtime_ns, is_folder=False)
    return None
