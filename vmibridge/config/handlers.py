"""Handlers from files, folders and dotted modules.

A module offers what its `handlers()` function returns, or else every concrete
`BridgeHandler` that it defines, in order; a folder or a package, what its modules offer.
A class that has `Settings` is made with them, decoded from the configuration; another is
made without arguments. Each VM gets handlers of its own, but for those that say `shared`.
"""

import hashlib
import importlib
import importlib.util
import logging
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.config.file import Config
from vmibridge.errors import (
    HandlerLoadError,
    HandlerSourceError,
    MissingExtraError,
    VmiBridgeError,
)

__all__ = ["HandlerFactory", "Offered", "find_handlers", "load_handlers", "reload_handlers"]

log: logging.Logger = logging.getLogger(__name__)

_OF_A_FILE = "vmibridge_handlers_"
"""What the names of modules begin with that are made of files."""

Offer: TypeAlias = BridgeHandler[Any] | type[BridgeHandler[Any]]


class Offered(NamedTuple):
    """One handler that a source offers: a class to make it of, or the handler itself."""

    source: str
    """The file, or the dotted module."""
    handler: Offer
    is_named: bool = True
    """Whether its module was named, and not only the folder or package that it is in."""


def find_handlers(sources: Iterable[str]) -> list[Offered]:
    """What the sources offer, in order, each once; none is made yet.

    Raises `HandlerSourceError` for a source that is not there or offers nothing,
    `HandlerLoadError` for a module that cannot be imported.
    """
    found: dict[int, Offered] = {}
    for source in sources:
        offers = [offer for module in _modules(source) for offer in _offers(*module)]
        if not offers:
            raise HandlerSourceError(
                f"{source}: offers no handler; a handler is a BridgeHandler with a REQUEST"
            )
        for offer in offers:
            is_named = offer.source == source
            known = found.setdefault(id(offer.handler), offer._replace(is_named=is_named))
            if is_named and not known.is_named:
                found[id(offer.handler)] = known._replace(is_named=True)
    return list(found.values())


class HandlerFactory:
    """Makes the handlers of one VM after the other: what a server of several VMs takes.

    Raises as `find_handlers` does, and `ConfigError` for settings of a handler that no
    source offers.
    """

    def __init__(self, sources: Iterable[str], config: Config | None = None) -> None:
        self._sources = list(sources)
        self._config = config or Config()
        self._shared: dict[tuple[str, int], BridgeHandler[Any]] = {}
        self._left_out: set[str] = set()
        """Names of handlers whose extra is missing."""
        offered = find_handlers(self._sources)
        self._config.check_handlers({offer.handler.name for offer in offered})

    def __call__(self, vm: str) -> Bridge:
        """The bridge of a VM. Raises as `make` does."""
        return Bridge(*self.make())

    def make(self) -> list[BridgeHandler[Any]]:
        """The handlers of one more VM, made with their settings.

        Raises `ConfigError` for settings that are wrong, `HandlerLoadError` when making
        one fails. One whose extra is missing is left out, with a warning in the log, where
        neither its module nor its settings are given; `MissingExtraError` where they are, or
        where no handler is left.
        """
        # Asked anew, so that what a `handlers()` function makes is made for each VM.
        handlers: list[BridgeHandler[Any]] = []
        missing: MissingExtraError | None = None
        for place, offer in enumerate(find_handlers(self._sources)):
            key = (offer.source, place)
            handler = self._shared.get(key)
            if handler is None:
                try:
                    handler = _make(offer, self._config)
                except MissingExtraError as error:
                    self._leave_out(offer, error)
                    missing = error
                    continue
            if handler.shared:
                self._shared[key] = handler
            handlers.append(handler)
        if missing is not None and not handlers:
            raise missing
        return handlers

    def _leave_out(self, offer: Offered, error: MissingExtraError) -> None:
        """Raises `error` where the handler was asked for."""
        name = offer.handler.name
        if offer.is_named or self._config.has_settings(name):
            raise error
        # Once, and not for each VM.
        if name not in self._left_out:
            self._left_out.add(name)
            log.warning("the handler %s is left out: %s", name, error)


def load_handlers(sources: Iterable[str], config: Config | None = None) -> list[BridgeHandler[Any]]:
    """The handlers of all sources, for one VM. Raises as `HandlerFactory` and its `make` do."""
    return HandlerFactory(sources, config).make()


def reload_handlers(sources: Iterable[str], config: Config | None = None) -> HandlerFactory:
    """Import the handlers again, from changed sources, and make them once, the shared ones too.

    Raises `VmiBridgeError`; then the modules of before are as they were.
    """
    sources = list(sources)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_of(name, sources)}
    importlib.invalidate_caches()
    try:
        factory = HandlerFactory(sources, config or Config())
        factory.make()
    except BaseException:  # a module may raise anything, SystemExit among it
        for name in list(sys.modules):
            if _is_of(name, sources):
                del sys.modules[name]
        sys.modules.update(before)
        raise
    return factory


def _is_of(module: str, sources: list[str]) -> bool:
    return module.startswith(_OF_A_FILE) or any(
        module == source or module.startswith(f"{source}.") for source in sources
    )


def _make(offer: Offered, config: Config) -> BridgeHandler[Any]:
    handler = offer.handler
    if isinstance(handler, BridgeHandler):
        config.refuse_settings(handler.name, f"is made by handlers() of {offer.source}")
        return handler
    try:
        if handler.Settings is None:
            config.refuse_settings(handler.name, "takes no settings")
            return handler()
        # The base class takes no arguments; one that has Settings says that it takes them.
        return handler(config.settings_of(handler.name, handler.Settings))  # type: ignore[call-arg]
    except VmiBridgeError:
        raise
    except Exception as error:
        raise HandlerLoadError(f"{offer.source}: {handler.__name__}: {_tell(error)}") from error


def _modules(source: str) -> list[tuple[str, ModuleType]]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.py") if not file.name.startswith("_"))
        return [(str(file), _import_file(file)) for file in files]
    if path.is_file():
        return [(source, _import_file(path))]
    if path.suffix == ".py" or not all(part.isidentifier() for part in source.split(".")):
        raise HandlerSourceError(f"{source}: there is no such file, folder or module")
    module = _import_dotted(source)
    if not hasattr(module, "__path__"):
        return [(source, module)]
    inner = sorted(found.name for found in pkgutil.iter_modules(module.__path__, f"{source}."))
    names = [name for name in inner if not name.rpartition(".")[2].startswith("_")]
    return [(source, module), *((name, _import_dotted(name)) for name in names)]


def _import_file(path: Path) -> ModuleType:
    # Two files of one name are two modules.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"{_OF_A_FILE}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HandlerSourceError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise HandlerLoadError(_place(error, str(path))) from error
    return module


def _import_dotted(name: str) -> ModuleType:
    # As `python -m` does: modules of the current folder can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise HandlerSourceError(f"{name}: there is no such file, folder or module") from error
        raise HandlerLoadError(_place(error, name)) from error
    except (Exception, SystemExit) as error:
        raise HandlerLoadError(_place(error, name)) from error


def _offers(source: str, module: ModuleType) -> list[Offered]:
    maker = vars(module).get("handlers")
    if not callable(maker):
        return [
            Offered(source, value)
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, BridgeHandler)
            and value.__module__ == module.__name__
            and value.is_concrete()
        ]
    try:
        made: list[Any] = list(maker())
    except (Exception, SystemExit) as error:
        raise HandlerLoadError(_place(error, source)) from error
    offered = []
    for handler in made:
        is_class = isinstance(handler, type) and issubclass(handler, BridgeHandler)
        if not is_class and not isinstance(handler, BridgeHandler):
            raise HandlerLoadError(f"{source}: handlers() returned {handler!r}, not a handler")
        offered.append(Offered(source, handler))
    return offered


def _place(error: BaseException, source: str) -> str:
    """`FILE:LINE: what happened`, with the line of the source itself where it is known."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or source}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.endswith(source)] or frames[-1:]
    line = own[-1].lineno if own and own[-1].filename.endswith(source) else None
    return f"{source}{'' if line is None else f':{line}'}: {_tell(error)}"


def _tell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
