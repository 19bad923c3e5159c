"""Handlers that are no error in themselves, but never answer, or whose answers no guest takes.

Each is said once for a factory, and not again for each VM.
"""

import logging
from collections.abc import Iterable
from inspect import isabstract
from typing import Any

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler, answers
from vmibridge.config.sources import Offered, SourceModule, handlers_of
from vmibridge.errors import HandlerLoadError

log: logging.Logger = logging.getLogger(__name__)

_STAMPS = tuple(f"VERIFY_VALUE{number}" for number in (1, 2, 3, 4))


class Checks:
    """See the module."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def modules(self, modules: Iterable[SourceModule]) -> None:
        """Warn of classes that answer, but have no request to be asked by."""
        for _, name, module in modules:
            kinds = handlers_of(module)
            for kind in kinds:
                is_base = any(issubclass(other, kind) for other in kinds if other is not kind)
                if (
                    answers(kind)
                    and not hasattr(kind, "REQUEST")
                    and not (is_base or isabstract(kind))
                ):
                    self._warn(f"{name}: {kind.__name__} has no REQUEST, so it is not offered")

    def offered(self, offered: Iterable[Offered]) -> None:
        """Warn of handlers of the standard contract that leave out its stamps."""
        for source, handler, _ in offered:
            kind = handler if isinstance(handler, type) else type(handler)
            if handler.MAGIC == STANDARD_MAGIC and not any(_says(kind, name) for name in _STAMPS):
                self._warn(
                    f"{source}: {handler.name} has the standard magic and no stamps: a guest of"
                    " the standard contract takes its answers for none; set VERIFY_VALUE3 and"
                    " VERIFY_VALUE4, to None where that is meant"
                )

    def made(self, made: list[tuple[Offered, BridgeHandler[Any]]]) -> None:
        """Raises `HandlerLoadError` for a module with two handlers of the same requests."""
        sources = {id(handler): offer.source for offer, handler in made}
        for entry, first in Bridge(*(handler for _, handler in made)).never_asked:
            source, other = sources[id(entry.target)], sources[id(first.target)]
            why = f"{first.name} answers request {entry.contract.request:#06x} before it"
            if source == other:
                raise HandlerLoadError(f"{source}: {entry.name} is never asked: {why}")
            # To put another one before it is a way to replace it.
            self._warn(f"{source}: {entry.name} is never asked: {why}, in {other}")

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _says(kind: type[BridgeHandler[Any]], name: str) -> bool:
    """Whether a class, or one that it derives from, has it, be it None."""
    return any(name in vars(base) for base in kind.__mro__ if base is not BridgeHandler)
