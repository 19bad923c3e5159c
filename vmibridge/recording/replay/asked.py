"""The handlers that a replay in a program is given, and what each VM gets of them."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from vmibridge.bridge.dispatch import Bridge, BridgeDispatch, Target
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.made_with import remember_settings
from vmibridge.errors import ConfigError
from vmibridge.text import repr_of, type_name

__all__ = ["Asked", "check_asked", "make_bridge", "may_share"]

Asked: TypeAlias = Target | type[BridgeHandler[Any]] | Callable[[str], Target]
"""An instance, a class, of which each VM gets an instance unless it says `shared`, or a function
that makes one for the VM that it is given the name of."""


def check_asked(handlers: Iterable[object]) -> None:
    """Raise `ConfigError` for what is no handler, and cannot be called to make one."""
    for each in handlers:
        if isinstance(each, BridgeHandler | BridgeDispatch):
            continue
        if not callable(each):
            raise ConfigError(
                f"{repr_of(each)} is no handler: a replay takes instances, classes, and functions"
                " of the name of a VM"
            )
        if isinstance(each, type) and issubclass(each, BridgeHandler):
            takes, count = ("no arguments", 0) if each.Settings is None else ("its Settings", 1)
        else:
            takes, count = "the name of a VM", 1
        try:
            inspect.signature(each).bind(*[None] * count)
        except TypeError as error:
            name = getattr(each, "__qualname__", type_name(each))
            raise ConfigError(f"{name} is called with {takes}: {error}") from None
        except ValueError:
            # One of C that does not tell what it takes.
            continue


def make_bridge(
    handlers: Iterable[Asked], vm: str, shared: dict[type[BridgeHandler[Any]], Target]
) -> Bridge:
    """That of one VM. `shared` has those of the VMs before that serve this one, too, as their
    classes say. Raises what making a handler raises."""
    return Bridge(*(_made_once(each, vm, shared) for each in handlers))


def may_share(handlers: Iterable[Asked]) -> bool:
    """Whether one of them may serve several VMs; what a function makes is not known before."""
    return any(getattr(_kind_of(each), "shared", True) for each in handlers)


def _made_once(asked: Asked, vm: str, shared: dict[type[BridgeHandler[Any]], Target]) -> Target:
    kind = _kind_of(asked) if isinstance(asked, type) else None
    if kind is None or not kind.shared:
        return _made(asked, vm)
    if kind not in shared:
        shared[kind] = _made(asked, vm)
    return shared[kind]


def _made(asked: Asked, vm: str) -> Target:
    if isinstance(asked, BridgeHandler | BridgeDispatch):
        return asked
    # The base class takes no arguments; one that has Settings says that it takes them.
    make: Callable[..., Target] = asked
    kind = _kind_of(asked)
    if kind is None:
        made: object = make(vm)
        if not isinstance(made, BridgeHandler | BridgeDispatch):
            name = getattr(make, "__qualname__", type_name(make))
            raise ConfigError(f"{name} made no handler for vm {vm}, but {type_name(made)}")
        return made
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
