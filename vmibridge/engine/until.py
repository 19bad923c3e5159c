"""When a run ends, other than with its guest."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.outcome import Outcome, OutcomeKind

__all__ = ["Until", "is_last_of"]

Until: TypeAlias = Literal["output", "exit"] | int | Callable[[Outcome[Any]], bool]
"""As `BridgeServer.run` takes it."""

_EXIT = 0xFFFF
"""The method by which a guest of the standard contract says that it is done."""


def is_last_of(until: Until) -> Callable[[Outcome[Any]], bool]:
    """Whether an outcome ends the run. Raises `ValueError`."""
    if callable(until):
        return until
    if until == "output":
        return lambda outcome: outcome.output is not None
    if until == "exit":
        return _is_exit
    if type(until) is not int or until < 1:
        raise ValueError(f"until is 'output', 'exit', a number from 1 or a function, got {until!r}")
    left = itertools.count(until - 1, -1)
    return lambda _: next(left) <= 0


def _is_exit(outcome: Outcome[Any]) -> bool:
    packet = outcome.packet
    return (
        packet.magic == STANDARD_MAGIC
        and packet.method == _EXIT
        and outcome.kind is OutcomeKind.HANDLED
    )
