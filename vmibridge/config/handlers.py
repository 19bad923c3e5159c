"""Handlers made from sources, for one VM after the other.

A class that has `Settings` is made with them, decoded from the configuration; another is
made without arguments. Each VM gets handlers of its own, but for those that say `shared`.

Sources are read when a factory is made, and again by `reload_handlers` alone: a VM that comes
later gets what was loaded, whatever the files say by then.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.made_with import remember_settings
from vmibridge.config import foreign
from vmibridge.config.file import Config
from vmibridge.config.handler_checks import Checks
from vmibridge.config.source_files import plain_modules
from vmibridge.config.sources import Offered, SourceReader, find_handlers, offered_by
from vmibridge.errors import HandlerLoadError, MissingExtraError, VmiBridgeError
from vmibridge.text import type_name

__all__ = ["HandlerFactory", "Offered", "find_handlers", "load_handlers", "reload_handlers"]

log: logging.Logger = logging.getLogger(__name__)


class HandlerFactory:
    """Makes the handlers of one VM after the other: what a server of several VMs takes.

    The sources are read now, by `reader` where one is given, and not again: what is changed in
    them has no effect.

    Raises as `find_handlers` does, and `ConfigError` for settings of a handler that no
    source offers.
    """

    def __init__(
        self,
        sources: Iterable[str],
        config: Config | None = None,
        *,
        reader: SourceReader | None = None,
    ) -> None:
        self._modules = (reader or SourceReader()).read(sources)
        self._config = config = config or Config()
        self._shared: dict[tuple[str, int], BridgeHandler[Any]] = {}
        self._left_out: set[str] = set()
        """Names of handlers whose extra is missing."""
        self._checks = Checks()
        offered = offered_by(self._modules)
        self.has_shared: bool = any(offer.handler.shared for offer in offered)
        """Whether a handler serves several VMs."""
        config.check_handlers({offer.handler.name for offer in offered})
        self._checks.modules(self._modules)
        self._checks.offered(offered)

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
        # Asked again, so that what a `handlers()` function makes is made for each VM.
        made: list[tuple[Offered, BridgeHandler[Any]]] = []
        missing: MissingExtraError | None = None
        for at, offer in enumerate(offered_by(self._modules)):
            key = (offer.source, at)
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
            made.append((offer, handler))
        if missing is not None and not made:
            raise missing
        self._checks.made(made)
        return [handler for _, handler in made]

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
    before = {name: sys.modules.pop(name) for name in _modules_of(sources)}
    reader = SourceReader(again=True)
    try:
        factory = HandlerFactory(sources, config, reader=reader)
        factory.make()
    except BaseException:  # Ctrl-C, too
        reader.undo()
        for name in _modules_of(sources):
            del sys.modules[name]
        sys.modules.update(before)
        raise
    reader.forget_old()
    return factory


def _modules_of(sources: list[str]) -> list[str]:
    """Modules that are loaded under plain names: those of dotted sources, and those that stand
    beside a file of handlers, in a folder that is on `sys.path`."""
    dotted = [
        name
        for name in list(sys.modules)
        if any(name == source or name.startswith(f"{source}.") for source in sources)
    ]
    return list(dict.fromkeys([*dotted, *plain_modules(sources)]))


def _make(offer: Offered, config: Config) -> BridgeHandler[Any]:
    handler = offer.handler
    if isinstance(handler, BridgeHandler):
        config.refuse_settings(handler.name, f"is made by handlers() of {offer.source}")
        made = handler
    else:
        made = _construct(offer, handler, config)
    # Its attributes may be its own, and wrong only now.
    foreign.run(lambda: Bridge(made), f"{offer.source}: {type_name(made)}")
    return made


def _construct(
    offer: Offered, kind: type[BridgeHandler[Any]], config: Config
) -> BridgeHandler[Any]:
    try:
        if kind.Settings is None:
            config.refuse_settings(kind.name, "takes no settings")
            return kind()
        # The base class takes no arguments; one that has Settings says that it takes them.
        settings = config.settings_of(kind.name, kind.Settings)
        made = kind(settings)  # type: ignore[call-arg]
        remember_settings(made, settings)
        return made
    except (VmiBridgeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        why = foreign.describe(error)
        raise HandlerLoadError(f"{offer.source}: {kind.__name__}: {why}") from error
