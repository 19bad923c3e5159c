"""Files that are made, and files that are put in the place of others."""

import errno
import os
import stat
import tempfile
from pathlib import Path

__all__ = ["is_own_file", "reason", "replaceable", "write_whole"]


def reason(error: OSError, target: Path) -> str:
    """Why `target` could not be made: the folder that is missing, or else what the system says."""
    if error.errno == errno.ENOENT and not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    return error.strerror or str(error)


def replaceable(target: Path) -> Path:
    """The path that a rename may take the place of to make `target` a new file.

    Links are followed, so that they stay. Raises `OSError` for what is there and is no regular
    file: a rename would take the place of a device, such as /dev/stdout, for the whole system.
    """
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is not a regular file; name another one", str(target))
    return target.resolve()


def write_whole(target: Path, data: bytes) -> None:
    """Write a file that gets its name when it is whole: until then what had the name stays.

    `target` is what `replaceable` gives. Raises `OSError`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - mkstemp opened it
            file.write(data)
            # What mkstemp denies to others, unlike `open`.
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(descriptor, 0o666 & ~umask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_own_file(path: Path) -> bool:
    """Whether only this user, or root, can have written the file: its owner, mode, and folder."""
    try:
        about, folder = path.lstat(), path.parent.stat()
    except OSError:
        return False
    mine = {os.geteuid(), 0}
    return stat.S_ISREG(about.st_mode) and all(
        each.st_uid in mine and not each.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for each in (about, folder)
    )
