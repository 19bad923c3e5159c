"""Compiles the QEMU plugin, whose source is in the package.

It needs a C compiler and the headers of the C library, and nothing of QEMU. The file appears
under its name when it is whole: a QEMU that has the one before loaded is not disturbed.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from vmibridge.errors import BackendError
from vmibridge.files import replaceable

FOLDER = Path(__file__).with_name("plugin")
SOURCES = tuple(sorted(FOLDER.glob("*.[ch]")))
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-shared", "-fPIC", "-O2", "-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden")
_SECONDS = 120.0


def build_plugin(target: Path, compiler: str | None = None) -> Path:
    """Compile the plugin into `target`; returns its absolute path. Raises `BackendError`."""
    command = _compiler(compiler)
    target = target.absolute()
    try:
        place = replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vmibridge-", dir=place.parent) as folder:
            made = Path(folder) / "plugin.so"
            _compile([command, *_FLAGS, "-o", str(made), *_units()])
            made.replace(place)
    except OSError as error:
        raise BackendError(f"{target}: cannot be made: {error.strerror}") from error
    return target


def _units() -> list[str]:
    return [str(source) for source in SOURCES if source.suffix == ".c"]


def _compiler(asked: str | None) -> str:
    for name in _COMPILERS if asked is None else (asked,):
        if found := shutil.which(name):
            return found
    missing = "there is no C compiler" if asked is None else f"there is no C compiler {asked!r}"
    raise BackendError(f"{missing}: install gcc and libc6-dev (on Debian), or name another by --cc")


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{command[0]}: took more than {_SECONDS:.0f} seconds") from error
    if done.returncode:
        raise BackendError(f"{command[0]} failed: {_first_message(done.stderr, done.returncode)}")


def _first_message(output: str, status: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return next(iter(errors or lines), f"it ended with status {status}")
