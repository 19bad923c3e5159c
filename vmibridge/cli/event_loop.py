"""The event loop that a command runs on, and what belongs to it."""

import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

import anyio

from vmibridge.errors import ConfigError, MissingExtraError

R = TypeVar("R")

Loop: TypeAlias = Literal["asyncio", "uvloop", "trio"]

_COLLECT_AFTER = 10_000
"""New objects; see docs/benchmarks.md."""


def chosen_loop(async_backend: Literal["asyncio", "trio"], *, uvloop: bool) -> Loop:
    """What `--async-backend` and `--uvloop` mean. Raises `ConfigError`: they do not go together."""
    if not uvloop:
        return async_backend
    if async_backend == "trio":
        raise ConfigError("--uvloop: uvloop is for asyncio, so it does not go with trio")
    return "uvloop"


def check_loop(loop: Loop) -> None:
    """Raises `MissingExtraError` for a loop that is not installed."""
    if loop == "asyncio":
        return
    try:
        __import__(loop)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the event loop {loop}", loop) from error


def run_on(loop: Loop, main: Callable[[], Awaitable[R]]) -> R:
    """Run `main` to its end, on that loop."""
    # With many handlers that wait, trio makes objects so fast that the default of 700
    # spends a good part of a core on collections.
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
    return anyio.run(
        main,
        backend="trio" if loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if loop == "uvloop" else {},
    )


@contextmanager
def logging_to(handler: logging.Handler, level: str) -> Iterator[None]:
    """Logs of `level` and above go to `handler`, for the time of the block."""
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
