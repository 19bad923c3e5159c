"""Files that are put in the place of others."""

import errno
from pathlib import Path

__all__ = ["replaceable"]


def replaceable(target: Path) -> Path:
    """The path that a rename may take the place of to make `target` a new file.

    Links are followed, so that they stay. Raises `OSError` for what is there and is no regular
    file: a rename would take the place of a device, such as /dev/stdout, for the whole system.
    """
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is no regular file; name another one", str(target))
    return target.resolve()
