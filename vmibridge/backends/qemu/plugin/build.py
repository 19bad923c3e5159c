"""Compiles the QEMU plugin, whose source is in the package.

It needs a C compiler and the headers of the C library, and nothing of QEMU. The file appears
under its name when it is whole: a QEMU that has the one before loaded is not disturbed.

A plugin that is kept has two hashes in its name: of what it was made from, sources and the
compiler's options, and of the file itself. QEMU runs it, so it is checked before each run.
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from vmibridge.errors import BackendError
from vmibridge.files import is_own_file, replaceable

FOLDER = Path(__file__).with_name("plugin")
SOURCES = tuple(sorted(FOLDER.glob("*.[ch]")))
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-shared", "-fPIC", "-O2", "-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden")
_SECONDS = 120.0
_DIGITS = 16
"""Of a hash in a name, in hex. Who may write in the folder is another question: `is_own_file`."""


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


def kept_plugin(cache: Path, tell: Callable[[str], object]) -> Path:
    """The plugin of these sources out of `cache`, where it is built once.

    One that is not what was built, or that others can have written, is removed and built again,
    which is told in one line. Raises `BackendError`.
    """
    made_from = _hash(
        b"\0".join(
            [
                *(flag.encode() for flag in _FLAGS),
                *(source.name.encode() + b"\0" + source.read_bytes() for source in SOURCES),
            ]
        )
    )
    for path in sorted(cache.glob(f"plugin-{made_from}-*.so")):
        why = _why_not(path)
        if why is None:
            return path
        tell(f"{path}: {why}: it is built again")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise BackendError(f"{path}: {why}, and cannot be removed: {error.strerror}") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vmibridge-", dir=cache) as folder:
            made = build_plugin(Path(folder) / "plugin.so")
            target = cache / f"plugin-{made_from}-{_hash(made.read_bytes())}.so"
            made.replace(target)
    except OSError as error:
        raise BackendError(f"{cache}: cannot be written: {error.strerror}") from error
    return target


def _why_not(path: Path) -> str | None:
    """Why a kept plugin is not to be loaded."""
    if not is_own_file(path):
        return "others than this user may have written it"
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if path.stem.endswith(f"-{_hash(content)}") else "is not what was built"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


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
