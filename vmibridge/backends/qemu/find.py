"""Finding a QEMU, and saying what is wrong with one that does not do."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import msgspec

from vmibridge.errors import BackendError

NAME = "qemu-system-x86_64"
FETCHED = Path("qemu") / NAME
"""Where `vmibridge qemu fetch` puts one, in the cache of the user."""
PLUGIN_NEEDS = (11, 1)
"""The first whose plugins can set the program counter."""
GDB_NEEDS = (7, 2)
"""The oldest that was tried."""

_SECONDS = 20.0
_RAM_PAGE = 8 << 10


class Qemu(msgspec.Struct, frozen=True):
    """One that was found."""

    path: str
    version: tuple[int, int]


def find_qemu(asked: str | None, need: tuple[int, int], for_older: str | None = None) -> Qemu:
    """The QEMU to use: `asked`, or the first that is new enough.

    `for_older` is what the error says that works with older ones.

    Looked for, in order: `VMIBRIDGE_QEMU`, the user's cache, `PATH`. Never in the current folder,
    which may be anybody's: the Makefile names that of a checkout. Raises `BackendError` with what
    was found instead, and what to do.
    """
    wanted = ".".join(map(str, need))
    named = asked or os.environ.get("VMIBRIDGE_QEMU")
    found = []
    cache = cache_folder()
    fetched = [] if cache is None else [str(cache / FETCHED)]
    for place in [named] if named else [*fetched, NAME]:
        path = shutil.which(place)
        if path is None:
            continue
        version = _version_of(path)
        if version is not None and version >= need:
            return Qemu(str(Path(path).absolute()), version)
        what = "says no version" if version is None else f"is {version[0]}.{version[1]}"
        found.append(f"{place} {what}")
    if named and not found:
        raise BackendError(f"{named}: there is no such program")
    hints = ["`vmibridge qemu fetch` brings one to a Debian"]
    if not asked:
        hints.append("--qemu PATH names another")
    if for_older is not None:
        hints.append(for_older)
    raise BackendError(
        f"no QEMU of {wanted} or later ({'; '.join(found) or f'no {NAME} at all'}):"
        f" {'; '.join(hints)}"
    )


def cache_folder() -> Path | None:
    """What vmibridge keeps for this user: in XDG_CACHE_HOME, or ~/.cache; `None`: no home."""
    # Relative paths are not valid there (XDG Base Directory Specification).
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "vmibridge"
    try:
        return Path.home() / ".cache/vmibridge"
    except RuntimeError:
        return None


def _version_of(path: str) -> tuple[int, int] | None:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own QEMU
            [path, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\bversion (\d+)\.(\d+)", done.stdout)
    return None if match is None else (int(match[1]), int(match[2]))


def accelerators(arguments: Sequence[str]) -> list[str]:
    """The accelerators that QEMU's arguments ask for, in their order."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = before.lstrip("-") if before.startswith("-") else ""
        if argument.lstrip("-") == "enable-kvm":
            found.append("kvm")
        elif option == "accel":
            found.append(argument.split(",")[0].removeprefix("accel="))
        elif option in ("machine", "M") and (match := re.search(r"\baccel=([\w:]+)", argument)):
            found += match[1].split(":")
    return found


def memory_size(arguments: Sequence[str]) -> int:
    """Bytes of guest memory that `-m` asks for; QEMU's default is 128 MiB.

    Raises `BackendError` for a size that cannot be read.
    """
    size = "128M"
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before.lstrip("-") == "m" and before.startswith("-"):
            size = argument
    first = size.split(",")[0].removeprefix("size=")
    # A fraction goes with a unit (QEMU, util/cutils.c, do_strtosz); RAM is in whole pages of 8 KiB
    # there (hw/core/machine.c, machine_set_mem).
    match = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,15})?([bBkKmMgGtT]?)", first)
    if match is not None:
        unit = 1 << {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}[(match[3] or "m").lower()]
        count = Fraction(match[1] + (match[2] or "")) * unit
        if count > 0 and (unit > 1 or match[2] is None):
            return -(-int(count) // _RAM_PAGE) * _RAM_PAGE
    raise BackendError(f"-m {size[:40]}: is not a memory size")


def has_memory_backend(arguments: Sequence[str]) -> bool:
    """Whether QEMU's arguments say what guest memory is made of, beyond its size."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = before.lstrip("-") if before.startswith("-") else ""
        if option in ("machine", "M") and "memory-backend=" in argument:
            return True
        if option == "object" and re.search(r"(^|qom-type\W+)memory-backend-", argument):
            return True
        if (option == "numa" and "mem" in argument) or option == "mem-path":
            return True
    return False
