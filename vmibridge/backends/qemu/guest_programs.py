"""What a program for Linux needs in a guest that has nothing else: its loader and libraries.

A static program needs nothing. What a dynamic one is linked with is found by `ldd`, which asks the
program's own loader; what it opens at run time by name (`dlopen`, NSS) is not found by anyone.
"""

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from vmibridge.errors import ConfigError

_MACHINES = {62: "x86-64", 3: "x86"}
"""EM_X86_64 and EM_386 (System V ABI)."""
_EXECUTABLE = (2, 3)
"""ET_EXEC and ET_DYN."""
_PT_INTERP = 3
_MAX_PATH = 4096
_SECONDS = 30.0
"""For `ldd`."""


class GuestProgram(NamedTuple):
    """A program that a guest can run."""

    path: Path
    libraries: dict[str, Path]
    """Its loader and its libraries, by their paths in the guest without the first slash."""


def guest_program(path: Path) -> GuestProgram:
    """Raises `ConfigError` for what is none, or whose libraries are not all there."""
    try:
        with path.open("rb") as file:
            loader = _loader_of(path, file.read())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if loader is None:
        return GuestProgram(path, {})
    return GuestProgram(path, {loader.lstrip("/"): Path(loader)} | _libraries_of(path, loader))


def _loader_of(path: Path, data: bytes) -> str | None:
    """The path of the loader that an ELF file asks for; `None`: it is static."""
    if data.startswith(b"#!"):
        raise ConfigError(f"{path}: is a script; a guest runs programs alone")
    try:
        if data[:4] != b"\x7fELF" or data[4] not in (1, 2) or data[5] != 1:
            raise ConfigError(f"{path}: is not an ELF program for x86")
        kind, machine = struct.unpack_from("<HH", data, 16)
        if machine not in _MACHINES or kind not in _EXECUTABLE:
            raise ConfigError(f"{path}: is not a program for x86")
        is_wide = data[4] == 2
        (table,) = struct.unpack_from("<Q" if is_wide else "<I", data, 32 if is_wide else 28)
        size, count = struct.unpack_from("<HH", data, 54 if is_wide else 42)
        for header in (data[table + n * size :][:size] for n in range(count)):
            if struct.unpack_from("<I", header)[0] != _PT_INTERP:
                continue
            if is_wide:
                start, length = struct.unpack_from("<8xQ16xQ", header)
            else:
                start, length = struct.unpack_from("<4xI8xI", header)
            return data[start : start + min(length, _MAX_PATH)].rstrip(b"\0").decode()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is a damaged ELF file") from error
    return None


def _libraries_of(path: Path, loader: str) -> dict[str, Path]:
    ldd = shutil.which("ldd")
    if ldd is None:
        raise ConfigError(f"{path}: needs libraries, and there is no ldd to find them: link static")
    # What is preloaded here is no part of the program.
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(  # noqa: S603 - the user's own program
            [ldd, str(path.absolute())],
            capture_output=True, text=True, errors="surrogateescape", timeout=_SECONDS,
            check=False, env={**kept, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{path}: ldd found no end within {_SECONDS:g} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise ConfigError(f"{path}: its libraries are not found: ldd: {lines[-1].strip()}")
    found: dict[str, Path] = {}
    for line in done.stdout.splitlines():
        if missing := re.fullmatch(r"\s*(.+) => not found", line):
            raise ConfigError(f"{path}: its library {missing[1]} is not found")
        # NAME => FILE (ADDRESS); without NAME it is the loader; without FILE it is in the kernel.
        each = re.fullmatch(r"\s*(.+) => (/.+) \(0x[0-9a-f]+\)", line)
        if each and each[1] != loader:
            found[f"lib/{Path(each[1]).name}"] = Path(each[2])
    return found
