"""The settings that a handler was made with, for those who record or show them.

A handler keeps of its settings what it likes, so whoever makes one says what it was given.
"""

from typing import Any

import msgspec

from vmibridge.bridge.handler import BridgeHandler

__all__ = ["made_with", "remember_settings"]

_NAME = "_vmibridge_settings"


def remember_settings(handler: BridgeHandler[Any], settings: msgspec.Struct) -> None:
    """The handler was made with these."""
    try:
        # Past a `__setattr__` of its own, as that of a frozen dataclass.
        object.__setattr__(handler, _NAME, settings)
    except AttributeError:
        # Of a class with slots.
        return


def made_with(handler: BridgeHandler[Any]) -> msgspec.Struct | None:
    """The settings, where they are known: else one of its attributes that is of their type."""
    kind = type(handler).Settings
    if kind is None:
        return None
    attributes: dict[str, object] = getattr(handler, "__dict__", {})
    for value in (attributes.get(_NAME), *attributes.values()):
        if isinstance(value, msgspec.Struct) and type(value) is kind:
            return value
    return None
