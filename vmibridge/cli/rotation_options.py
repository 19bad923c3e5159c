"""`--rotate` and `--keep`: how large recordings become, and how many there are.

| | is | |
|---|---|---|
| `256M`, `256MiB` | bytes, in units of 1024 | of a file, or of all |
| `90s`, `30m`, `1h`, `7d` | a time | of a file |
| `10` | a number of files | of all |
"""

import re
from collections.abc import Sequence

from vmibridge.cli.options import bytes_of
from vmibridge.errors import ConfigError

__all__ = ["keep_of", "rotate_of"]

_SIZE = re.compile(r"[0-9]{1,12}[KMG](?:iB)?")
_TIME = re.compile(r"([0-9]{1,12})([smhd])")
_COUNT = re.compile(r"[0-9]{1,12}")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def rotate_of(given: Sequence[str]) -> tuple[int | None, int | None]:
    """The most bytes and seconds of a file, where they are given. Raises `ConfigError`."""
    size = age = None
    for text in given:
        if _SIZE.fullmatch(text) and size is None:
            size = bytes_of("--rotate", text)
        elif (match := _TIME.fullmatch(text)) is not None and age is None:
            age = int(match[1]) * _SECONDS[match[2]]
        else:
            raise ConfigError(
                f"--rotate {text[:40]}: is not a size or a time; give one of each, as in 256M and"
                " 1h"
            )
    return size, age


def keep_of(given: Sequence[str]) -> tuple[int | None, int | None]:
    """The most bytes and files of a folder, where they are given. Raises `ConfigError`."""
    size = files = None
    for text in given:
        if _SIZE.fullmatch(text) and size is None:
            size = bytes_of("--keep", text)
        elif _COUNT.fullmatch(text) and files is None:
            files = int(text)
        else:
            raise ConfigError(
                f"--keep {text[:40]}: is not a number of files or a size; give one of each, as in"
                " 10 and 2G"
            )
    return size, files
