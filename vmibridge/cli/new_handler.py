"""`vmibridge new handler`: a folder to begin with, that works as it is.

| file | is |
|---|---|
| `NAME.py` | the handler, with typed methods |
| `test_NAME.py` | its tests, by the fixtures of the pytest plugin |
| `guest.c` | a guest that asks it, by the generated header |
| `Makefile` | runs the guest, and the tests |

The name becomes a module, a class and a part of the names of C functions: so it is checked first.
"""

import keyword
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import vmibridge
from vmibridge.errors import ConfigError, VmiBridgeError
from vmibridge.files import reason
from vmibridge.text import printable

_TEMPLATES = Path(__file__).parent / "templates" / "handler"
_FILES = {
    "handler.py.in": "{name}.py",
    "test_handler.py.in": "test_{name}.py",
    "guest.c.in": "guest.c",
    "Makefile.in": "Makefile",
    "gitignore.in": ".gitignore",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_MAX_NAME = 40
_OURS = frozenset({"start", "vmibridge", "handlers", "bridge", "guest"})
"""Names of headers that a guest includes, and of the guest."""
_C_HEADERS = frozenset(
    {"float", "iso646", "limits", "stdalign", "stdarg", "stdbool", "stddef", "stdint"}
)
"""What a C compiler has without a library, and would find in the folder first."""


def new_handler(
    name: Annotated[str, Parameter(help="Its name, in snake case, as in file_verdicts.")],
    /,
    *,
    folder: Annotated[
        Path | None, Parameter(help="The folder to make it in; the current one by default.")
    ] = None,
) -> int:
    """Make a folder with a handler of your own, its test, and a guest in C that asks it.

    Example: vmibridge new handler greeter && make -C greeter
    """
    _check(name)
    target = (folder or Path()) / name
    kind = _class_of(name)
    words = {
        "NAME": name,
        "CLASS": kind,
        "PYTHON": _python(),
        "LINES": "" if _snake(kind) == name else f'    name = "{name}"\n',
    }
    made = _make(target, words)
    commands = f"cd {printable(shlex.quote(str(target)))} && make"
    sys.stdout.write(
        f"{printable(str(target))}: {', '.join(made)}\n"
        f"run the guest: {commands}\n"
        f"run the tests: {commands} test\n"
    )
    return 0


def _check(name: str) -> None:
    """Raises `ConfigError` for what is no name of a module, or that of another."""
    shown = printable(name[:80])
    snake = re.sub(r"[^a-z0-9]+", "_", _snake(name)).strip("_")
    if not name.isascii() or not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        hint = f", such as {snake}" if _NAME.fullmatch(snake) and len(snake) <= _MAX_NAME else ""
        raise ConfigError(
            f"{shown!r} is no name of a handler: give a word of a-z, 0-9 and _, of at most"
            f" {_MAX_NAME} characters{hint}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ConfigError(f"{name} is a word of Python: choose another name")
    if name in _OURS or name.startswith("test_") or name.endswith("_test") or name == "conftest":
        raise ConfigError(f"{name} is the name of another file of a handler: choose another name")
    if name in _C_HEADERS:
        raise ConfigError(f"{name} is the name of a header of C: choose another name")
    if _class_of(name) in vmibridge.__all__:
        raise ConfigError(
            f"{name} would be the class {_class_of(name)}, which vmibridge has: choose another name"
        )
    if name in sys.stdlib_module_names or _is_installed(name):
        raise ConfigError(
            f"{name} is a module that is installed, which import {name} would find: choose another"
            " name"
        )


def _class_of(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _is_installed(name: str) -> bool:
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        return True
    # A folder without `__init__.py` gives way to a file.
    return found is not None and found.origin is not None and not _is_here(found.origin)


def _is_here(origin: str) -> bool:
    return Path(origin).resolve().parent == Path.cwd()


def _snake(name: str) -> str:
    """The name of a handler class, as the base class makes it."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _python() -> str:
    """How make calls this Python: by its path, unless `python3` is it."""
    found = shutil.which("python3")
    own = Path(sys.executable)
    if found is not None and Path(found).parent == own.parent:
        return "python3"
    return str(own).replace("$", "$$").replace("#", "\\#")


def _make(folder: Path, words: dict[str, str]) -> list[str]:
    """Make the folder, whole or not at all; returns the names of its files."""
    texts: dict[str, str] = {}
    for template, target in _FILES.items():
        try:
            text = (_TEMPLATES / template).read_text("utf-8")
        except OSError as error:
            raise VmiBridgeError(
                f"{_TEMPLATES / template}: is missing: install vmibridge again"
            ) from error
        filled = re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)
        texts[target.format(name=words["NAME"])] = filled
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise ConfigError(
            f"{folder}: is there already: choose another name, or --folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder}: {reason(error, folder)}") from error
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8", newline="\n")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise VmiBridgeError(f"{folder}: {os.strerror(error.errno or 0)}") from error
    return [name for name in texts if not name.startswith(".")]
