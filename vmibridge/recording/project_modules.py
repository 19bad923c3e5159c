"""The modules of a project that a handler is made of, and their hashes.

A handler may change without its own file: by what it imports. Of a project is a module that
stands in no folder of installed packages or of Python, and not in vmibridge. It is found by the
import statements of the source, wherever in it they stand, among the modules that are loaded.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

__all__ = ["module_name", "project_modules"]

_MAX_MODULES = 1000
_MAX_SOURCE = 4 << 20
"""Bytes of a file that is looked into."""
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_VMIBRIDGE = Path(__file__).resolve().parents[1]


def module_name(name: str) -> str:
    """The name of a module; of one beside a file of handlers without the folder that both are in,
    which is nobody's business."""
    _, slash, inner = name.rpartition("/")
    return inner.partition(".")[2] or "__init__" if slash else name


def project_modules(module: str) -> dict[str, str]:
    """From the names of the modules that this one imports, and those import, to the SHA-256 of
    their files. The module itself is not in it; 1,000 are at most."""
    found: dict[str, str] = {}
    seen = {module}
    waiting = [module]
    while waiting and len(found) < _MAX_MODULES:
        name = waiting.pop()
        loaded = sys.modules.get(name)
        source = None if loaded is None else _source_of(loaded)
        if source is None or loaded is None:
            continue
        digest, imports = source
        if name != module:
            found[module_name(name)] = digest
        found.update(_not_loaded(loaded, imports))
        for other in sorted(set(_loaded_by(loaded, imports)) - seen):
            seen.add(other)
            waiting.append(other)
    return dict(sorted(found.items()))


def _source_of(module: ModuleType) -> "tuple[str, tuple[tuple[int, str], ...]] | None":
    """The digest and the imports of the file of a module of the project."""
    name = getattr(module, "__file__", None)
    if not isinstance(name, str) or not name.endswith(".py"):
        return None
    try:
        path = Path(name).resolve()
        if not _is_of_project(path):
            return None
        about = path.stat()
        return _read(path, about.st_mtime_ns, about.st_size)
    except OSError:
        return None


def _is_of_project(path: Path) -> bool:
    if not _INSTALLED.isdisjoint(path.parts) or path.is_relative_to(_VMIBRIDGE):
        return False
    return not any(path.is_relative_to(folder) for folder in _python_folders())


@lru_cache(maxsize=1)
def _python_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple(Path(paths[name]).resolve() for name in ("stdlib", "platstdlib"))


# By what tells one state of a file from another: each VM that begins asks again.
@lru_cache(maxsize=4096)
def _read(path: Path, _changed: int, size: int) -> tuple[str, tuple[tuple[int, str], ...]]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if size > _MAX_SOURCE:
        return digest, ()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return digest, ()
    return digest, tuple(dict.fromkeys(_imports(tree)))


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What is imported: the dots in front, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield node.level, base
            for alias in node.names:
                # It may be a module of that package.
                yield node.level, f"{base}.{alias.name}".lstrip(".")


def _loaded_by(module: ModuleType, imports: tuple[tuple[int, str], ...]) -> Iterator[str]:
    package = module.__package__ or ""
    for level, name in imports:
        # A file of handlers imports those beside it by their plain names, too.
        bases = [package] if level == 0 else [_above(package, level - 1)]
        names = [f"{base}.{name}".strip(".") for base in bases if base]
        for each in (*names, *([name] if level == 0 else [])):
            for known in _with_parents(each):
                if known in sys.modules:
                    yield known


def _not_loaded(module: ModuleType, imports: tuple[tuple[int, str], ...]) -> dict[str, str]:
    """Those beside a module that it imports later, as inside of a function."""
    found = {}
    folder = Path(str(module.__file__)).parent
    package = module.__package__ or ""
    for level, name in imports:
        known = f"{package}.{name}".strip(".")
        if level > 1 or not name or {name, known} & sys.modules.keys():
            continue
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        try:
            about = path.stat()
            found[module_name(known)] = _read(path, about.st_mtime_ns, about.st_size)[0]
        except (OSError, ValueError):
            continue
    return found


def _above(package: str, levels: int) -> str:
    for _ in range(levels):
        package = package.rpartition(".")[0]
    return package


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
