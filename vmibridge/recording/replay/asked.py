"""The handlers that a replay in a program is given, and what each VM gets of them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from vmibridge.bridge.dispatch import Bridge, BridgeDispatch, Target
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.made_with import remember_settings

__all__ = ["Asked", "make_bridge", "may_share"]

Asked: TypeAlias = Target | type[BridgeHandler[Any]] | Callable[[str], Target]
"""An instance, a class, or a function that makes one for the VM that it is given the name of."""


def make_bridge(handlers: Iterable[Asked], vm: str) -> Bridge:
    """That of one VM. Raises what making a handler raises."""
    return Bridge(*(_made(each, vm) for each in handlers))


def may_share(handlers: Iterable[Asked]) -> bool:
    """Whether one of them may serve several VMs; what a function makes is not known before."""
    return any(getattr(_kind_of(each), "shared", True) for each in handlers)


def _made(asked: Asked, vm: str) -> Target:
    if isinstance(asked, BridgeHandler | BridgeDispatch):
        return asked
    # The base class takes no arguments; one that has Settings says that it takes them.
    make: Callable[..., Target] = asked
    kind = _kind_of(asked)
    if kind is None:
        return make(vm)
    if kind.Settings is None:
        return make()
    settings = kind.Settings()
    made = make(settings)
    if isinstance(made, BridgeHandler):
        remember_settings(made, settings)
    return made


def _kind_of(asked: Asked) -> type[BridgeHandler[Any]] | None:
    kind = asked if isinstance(asked, type) else type(asked)
    return kind if issubclass(kind, BridgeHandler) else None
