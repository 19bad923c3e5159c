"""The files that sources of handlers are read from: what a reload would read again."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from vmibridge.config import loaded

__all__ = ["plain_modules", "source_files"]

_MAX_FILES = 4096
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def source_files(sources: Iterable[str]) -> list[Path]:
    """Those of the modules that are loaded, and what else may be imported from beside a file: each
    `*.py` there that is no test. 4,096 at most. Blocking; raises nothing.
    """
    found = (path for source in sources for path in _files_of(source))
    return list(dict.fromkeys(islice(found, _MAX_FILES)))


def plain_modules(sources: Iterable[str]) -> list[str]:
    """The names of loaded modules whose files stand beside a source that is a file, or in one that
    is a folder, and which `sys.path` leads to."""
    beside = {path.resolve() for source in sources for path in _beside(Path(source))[1]}
    names = {path.name for path in beside if _INSTALLED.isdisjoint(path.parts)}
    return [
        name
        for name, module in list(sys.modules.items())
        if name != "__main__"
        and not name.startswith("vmibridge.")
        and (file := _file_of(module)) is not None
        and file.name in names
        and file.resolve() in beside
    ]


def _file_of(module: object) -> Path | None:
    # Not by `getattr`, by which a module may import what it stands for.
    name = getattr(module, "__dict__", {}).get("__file__")
    return Path(name) if isinstance(name, str) else None


def _beside(path: Path) -> tuple[Path | None, list[Path]]:
    """The folder of a source, and the Python files in it."""
    try:
        folder = path if path.is_dir() else path.parent if path.is_file() else None
        return folder, [] if folder is None else sorted(islice(folder.glob("*.py"), _MAX_FILES))
    except OSError:
        return None, []


def _files_of(source: str) -> Iterator[Path]:
    path = Path(source)
    folder, beside = _beside(path)
    if folder is None and path.suffix == ".py":
        # It is gone; it may come back.
        folder, beside = path.parent, [path]
    if folder is None:
        yield from _loaded(lambda name: name == source or name.startswith(f"{source}."))
        return
    yield from (each for each in beside if not _is_test(each))
    generation = loaded.newest(folder.resolve())
    if generation is not None:
        package = loaded.package_of(folder.resolve(), generation)
        # Also those of packages inside.
        own = {each.resolve() for each in beside}
        for each in _loaded(lambda name: name.startswith(f"{package}.")):
            if each.resolve() not in own or _is_test(each):
                yield each


def _loaded(is_one: Callable[[str], bool]) -> Iterator[Path]:
    for name, module in list(sys.modules.items()):
        file = _file_of(module) if is_one(name) else None
        if file is not None:
            yield file


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") or path.stem.endswith("_test") or path.stem == "conftest"
