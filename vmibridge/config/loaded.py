"""Modules that are made of handler files, under names that every process can import.

    vmibridge.config.loaded./srv/handlers.fetch          /srv/handlers/fetch.py
    vmibridge.config.loaded./srv/handlers@2.fetch        the same, after it was reloaded twice

A folder is a package: its modules import each other by `from . import common`, and by `import
common` as when one of them is run by `python FILE`. The name holds the folder, so

- two folders with modules of the same names do not meet;
- what such a module defines can be pickled by name: a process that unpickles it (of
  `anyio.to_process`, `multiprocessing`, or a later run) finds the file by the name alone, once it
  has imported this module, which Python does for it;
- a module that is reloaded gets another name: an older one still works for handlers that have
  not ended yet, and a worker process cannot take the one for the other.

Invariants:

- `import common` takes the file beside the module, but for three cases: a name of the standard
  library or `vmibridge`, the module's own name (`redis.py` imports the library redis), and a file
  that `sys.path` leads to as well, which stays one module. Nothing is put on `sys.path`: there it
  would shadow modules that libraries import.
- Bytecode is neither read nor written: it would be that of the file without these imports, and a
  change within a second would go unseen.
"""

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

__all__ = ["forget", "import_file", "names", "newest", "package_of"]

__path__: list[str] = []
"""It has modules inside; where, is for the finder below to say."""

_PREFIX = f"{__name__}."
_ATTEMPTS = 3


def package_of(folder: Path, generation: int = 0) -> str:
    """The name of a folder as a package; one more `generation` for each time it is reloaded."""
    return f"{_PREFIX}{_escape(folder)}{f'@{generation}' if generation else ''}"


def newest(folder: Path) -> int | None:
    """The latest generation of a folder that is loaded; `None`: none is."""
    own = _escape(folder)
    found: list[int] = []
    for name in sys.modules:
        package, _, inner = name.removeprefix(_PREFIX).partition(".")
        if name.startswith(_PREFIX) and not inner:
            escaped, _, generation = package.partition("@")
            if escaped == own:
                found.append(int(generation or 0))
    return max(found, default=None)


def import_file(path: Path, package: str) -> ModuleType | None:
    """The module of a file in the folder of `package`; `None` for what is no Python file.

    Raises whatever the module does.
    """
    if spec_from_file_location(path.stem, path) is None:
        return None
    return importlib.import_module(f"{package}.{_escape(path.stem)}")


def forget(package: str) -> None:
    """Take a folder's modules out of `sys.modules`; what uses them goes on with them."""
    for name in names(package):
        del sys.modules[name]


def names(package: str) -> list[str]:
    """The modules of a folder that are loaded, and the package itself."""
    return [name for name in sys.modules if name == package or name.startswith(f"{package}.")]


def _escape(path: Path | str) -> str:
    # Dots separate modules, and @ the generation, which `quote` escapes.
    return quote(os.fsencode(path), safe="/").replace(".", "%2E")


def _unescape(name: str) -> str:
    return os.fsdecode(unquote_to_bytes(name))


class _Finder(MetaPathFinder):
    """Finds folders and what is in them by the names above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        package, _, inner = fullname.removeprefix(_PREFIX).partition(".")
        folder = Path(_unescape(package.partition("@")[0]))
        if not inner:
            return self._package(fullname, folder)
        file = folder / f"{_unescape(inner)}.py"
        if "." not in inner and file.is_file():
            # Also where a folder of this name is beside it: the file is what was named.
            loader = _Loader(fullname, str(file))
            return spec_from_file_location(fullname, file, loader=loader)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec

    def _package(self, fullname: str, folder: Path) -> ModuleSpec | None:
        first = folder / "__init__.py"
        places = [str(folder)]
        if first.is_file():
            loader = _Loader(fullname, str(first))
            return spec_from_file_location(
                fullname, first, loader=loader, submodule_search_locations=places
            )
        if not folder.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = places
        return spec


class _Loader(SourceFileLoader):
    """Runs a module so that it finds those beside it."""

    def get_code(self, fullname: str) -> CodeType:
        file = self.get_filename(fullname)
        data = self.get_data(file)
        try:
            code: CodeType = compile(self._tree(data, file), file, "exec", dont_inherit=True)
        except RecursionError:
            # An expression nested deeper than a tree may be: then as it stands.
            code = compile(data, file, "exec", dont_inherit=True)
        return code

    def _tree(self, data: bytes, file: str) -> ast.Module:
        package, *inner = self.name.removeprefix(_PREFIX).split(".")
        # One dot is the package that a module is in, or that a package is itself.
        dots = len(inner) + self.is_package(self.name)
        folder = Path(_unescape(package.partition("@")[0]))
        tree = _parse(data, file)
        _take_siblings(tree, _Siblings(folder, self.path, dots))
        return tree


def _parse(data: bytes, file: str) -> ast.Module:
    # CPython counts wrongly, and says so, when a finalizer parses something in between
    # (https://github.com/python/cpython/issues/106905); the next time it does not.
    for _ in range(_ATTEMPTS):
        try:
            return ast.parse(data, file)
        except SystemError:
            continue
    return ast.parse(data, file)


class _Siblings:
    """What `import NAME` means in one module."""

    def __init__(self, folder: Path, own: str, level: int) -> None:
        self._folder = folder
        self._own = own
        self._level = level
        self._known: dict[str, bool] = {}

    def replace(self, statement: ast.stmt) -> list[ast.stmt]:
        """The statement, or those that import the same from beside the module."""
        if isinstance(statement, ast.ImportFrom):
            if statement.level == 0 and statement.module and self._has(statement.module):
                statement.level = self._level
            return [statement]
        if not isinstance(statement, ast.Import):
            return [statement]
        if not any(self._has(alias.name) for alias in statement.names):
            return [statement]
        made: list[ast.stmt] = []
        for alias in statement.names:
            made += self._imports(alias) if self._has(alias.name) else [ast.Import([alias])]
        return [ast.fix_missing_locations(ast.copy_location(each, statement)) for each in made]

    def _imports(self, alias: ast.alias) -> list[ast.stmt]:
        above, _, last = alias.name.rpartition(".")
        if alias.asname or not above:
            return [ast.ImportFrom(above or None, [ast.alias(last, alias.asname)], self._level)]
        # `import a.b` imports both and binds `a`.
        first = alias.name.partition(".")[0]
        return [
            ast.ImportFrom(above, [ast.alias(last, first)], self._level),
            ast.ImportFrom(None, [ast.alias(first)], self._level),
        ]

    def _has(self, module: str) -> bool:
        name = module.partition(".")[0]
        if name not in self._known:
            self._known[name] = self._look_for(name)
        return self._known[name]

    def _look_for(self, name: str) -> bool:
        if name in sys.stdlib_module_names or name == "vmibridge":
            return False
        here = PathFinder.find_spec(name, [str(self._folder)])
        if here is None or here.origin == self._own:
            return False
        try:
            elsewhere = find_spec(name)
        except (ImportError, ValueError):
            elsewhere = None
        if elsewhere is None or here.origin is None:
            # A folder without `__init__.py` gives way: it may hold anything.
            return elsewhere is None
        return elsewhere.origin is None or not _is_same(here.origin, elsewhere.origin)


def _is_same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _take_siblings(tree: ast.Module, siblings: _Siblings) -> None:
    # Statement by statement, and never into expressions, which may be nested deeper than
    # Python's stack.
    blocks: list[Any] = [tree]
    while blocks:
        node = blocks.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                block[:] = [made for each in block for made in _replaced(each, siblings)]
                blocks += block


def _replaced(node: Any, siblings: _Siblings) -> list[Any]:
    return siblings.replace(node) if isinstance(node, ast.stmt) else [node]


# When it is imported: in a process that unpickles, nothing else would do it. Before the finder of
# paths, which would take the modules of a folder for its own.
sys.meta_path.insert(0, _Finder())
