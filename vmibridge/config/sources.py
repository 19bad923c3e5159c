"""Sources of handlers: files, folders and dotted modules, and what each offers.

A module offers what its `handlers` says, a function or a list, or else every concrete
`BridgeHandler` that it defines, in order; a folder or a package, what its modules offer.
A source is read once. What can be seen of a class without making it is checked here.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from inspect import iscoroutine
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, cast

from vmibridge.bridge.handler import BridgeHandler, contract_of
from vmibridge.config import foreign, loaded
from vmibridge.config.slow_loading import told_when_slow
from vmibridge.errors import HandlerLoadError, HandlerSourceError
from vmibridge.text import printable, repr_of, type_name

__all__ = ["Offered", "SourceModule", "SourceReader", "find_handlers", "handlers_of", "offered_by"]

_SOURCES = "name a Python file, a folder or a dotted module"
_KEPT = 4
"""Generations of a folder, beside the newest, that can still be pickled by name: handlers that
were reloaded may go on for as long as a result is waited for."""

Offer: TypeAlias = BridgeHandler[Any] | type[BridgeHandler[Any]]


class Offered(NamedTuple):
    """One handler that a source offers: a class to make it of, or the handler itself."""

    source: str
    """The file, or the dotted module."""
    handler: Offer
    is_named: bool = True
    """Whether its module was named, and not only the folder or package that it is in."""


class SourceModule(NamedTuple):
    """One module of a source."""

    source: str
    """What was given, as `handlers/`."""
    name: str
    """What it is called in messages, as `handlers/log.py`."""
    module: ModuleType


def find_handlers(sources: Iterable[str]) -> list[Offered]:
    """What the sources offer, in order, each once; none is made yet.

    Raises `HandlerSourceError` for a source that is not there or offers nothing,
    `HandlerLoadError` for a module that cannot be imported, or a handler that cannot work.
    """
    return offered_by(SourceReader().read(sources))


class SourceReader:
    """Reads sources; with `again`, also those that are loaded."""

    def __init__(self, *, again: bool = False) -> None:
        self._again = again
        self._packages: dict[Path, tuple[str, int]] = {}
        """From a folder to its package, and which generation that is."""
        self._before = set(sys.modules)

    def read(self, sources: Iterable[str]) -> list[SourceModule]:
        """The modules, in order. Raises as `find_handlers` does."""
        importlib.invalidate_caches()
        sources = list(sources)
        if not sources:
            raise HandlerSourceError(f"no source of handlers is given: {_SOURCES}")
        try:
            return [module for source in sources for module in self._modules(source)]
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Forget what was read, so that it is read again once it was mended."""
        for package, _ in self._packages.values():
            for name in loaded.names(package):
                if name not in self._before:
                    del sys.modules[name]

    def forget_old(self) -> None:
        """Let go of the modules that no handler can be of any more."""
        for folder, (_, generation) in self._packages.items():
            if generation > _KEPT:
                loaded.forget(loaded.package_of(folder, generation - _KEPT - 1))

    def _modules(self, source: str) -> list[SourceModule]:
        if not source.strip():
            raise HandlerSourceError(f"a source of handlers is empty: {_SOURCES}")
        path = Path(source)
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            raise HandlerSourceError(f"{source}: {error.strerror}") from error
        if is_folder:
            files = sorted(file for file in path.glob("*.py") if not file.name.startswith("_"))
            if not files:
                raise HandlerSourceError(
                    f"{source}: there is no handler in it, as no file there is a *.py whose name"
                    " does not begin with _"
                )
            return [SourceModule(source, str(file), self._import_file(file)) for file in files]
        if is_file:
            return [SourceModule(source, source, self._import_file(path))]
        if path.suffix == ".py" or not all(part.isidentifier() for part in source.split(".")):
            raise HandlerSourceError(f"{source}: there is no such file, folder or module")
        module = _import_dotted(source)
        if not hasattr(module, "__path__"):
            return [SourceModule(source, source, module)]
        inner = sorted(found.name for found in pkgutil.iter_modules(module.__path__, f"{source}."))
        names = [name for name in inner if not name.rpartition(".")[2].startswith("_")]
        return [
            SourceModule(source, source, module),
            *(SourceModule(source, name, _import_dotted(name)) for name in names),
        ]

    def _import_file(self, path: Path) -> ModuleType:
        # Of a link to a file the folder is that of the link: it is what the user sees.
        folder = path.parent.resolve()
        if folder not in self._packages:
            known = loaded.newest(folder)
            generation = 0 if known is None else known + self._again
            self._packages[folder] = (loaded.package_of(folder, generation), generation)
        package, _ = self._packages[folder]
        with told_when_slow(str(path)):
            module = foreign.run(
                lambda: loaded.import_file(path, package), str(path), folder / path.name
            )
        if module is None:
            raise HandlerSourceError(f"{path}: is not a Python file")
        return module


def _import_dotted(name: str) -> ModuleType:
    # As `python -m` does: modules of the current folder can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with told_when_slow(name):
            return foreign.run(lambda: importlib.import_module(name), name)
    except HandlerLoadError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise HandlerSourceError(f"{name}: there is no such file, folder or module") from cause
        raise


def offered_by(modules: Iterable[SourceModule]) -> list[Offered]:
    """What the modules offer, each once. Raises as `find_handlers` does."""
    found: dict[int, Offered] = {}
    empty: dict[str, bool] = {}
    for source, name, module in modules:
        offers = _offers(name, module)
        empty[source] = empty.get(source, True) and not offers
        for offer in offers:
            is_named = name == source
            known = found.setdefault(id(offer.handler), offer._replace(is_named=is_named))
            if is_named and not known.is_named:
                found[id(offer.handler)] = known._replace(is_named=True)
    for source, is_empty in empty.items():
        if is_empty:
            raise HandlerSourceError(
                f"{source}: offers no handler; a handler is a BridgeHandler with a REQUEST"
            )
    return list(found.values())


def _offers(source: str, module: ModuleType) -> list[Offered]:
    said = vars(module).get("handlers")
    if said is None or isinstance(said, ModuleType):
        # A module of that name inside a package says nothing.
        made: list[Any] = [kind for kind in handlers_of(module) if kind.is_concrete()]
    elif callable(said):
        made = foreign.run(lambda: _ask(said), source, _file_of(module))
    elif isinstance(said, list | tuple):
        made = list(said)
    else:
        raise HandlerLoadError(
            f"{source}: handlers is of type {type_name(said)}; it is a function or a list of"
            " handlers where a module has that name"
        )
    whose = "handlers() returned" if callable(said) else "handlers has"
    offered = []
    for handler in made:
        is_class = isinstance(handler, type) and issubclass(handler, BridgeHandler)
        if not is_class and not issubclass(type(handler), BridgeHandler):
            shown = printable(repr_of(handler)[:80])
            raise HandlerLoadError(f"{source}: {whose} {shown}, not a handler")
        if not is_class and not callable(said) and not handler.shared:
            raise HandlerLoadError(
                f"{source}: handlers has an object of {type_name(handler)}, which would serve"
                " every VM with one state; name the class, or make it in a function handlers()"
            )
        try:
            contract_of(handler)
        except (TypeError, ValueError) as error:
            raise HandlerLoadError(f"{source}: {error}") from error
        offered.append(Offered(source, handler))
    return offered


def handlers_of(module: ModuleType) -> list[type[BridgeHandler[Any]]]:
    """The classes of handlers that a module defines, in order."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BridgeHandler)
        and value.__module__ == module.__name__
    ]


def _ask(maker: Callable[[], Any]) -> list[Any]:
    made: object = maker()
    if iscoroutine(made):
        made.close()
        raise TypeError("handlers() is async; what it makes is entered by the server")
    return list(cast("Iterable[Any]", made))


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name) if isinstance(name, str) else None
