"""The event loop that a command runs on, and what belongs to it."""

import gc
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from vmibridge.cli.options import Loop
from vmibridge.errors import MissingExtraError

if TYPE_CHECKING:
    from vmibridge.aio.clock import VirtualTime
    from vmibridge.health.state import Health

R = TypeVar("R")

COLLECT_AFTER = 50_000
"""New objects; see docs/benchmarks.md."""


def check_loop(loop: Loop) -> None:
    """Raises `MissingExtraError` for a loop that is not installed."""
    if loop == "asyncio":
        return
    try:
        __import__(loop)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the event loop {loop}", loop) from error


def run_on(loop: Loop, main: Callable[[], Awaitable[R]], virtual: "VirtualTime | None" = None) -> R:
    """Run `main` to its end, on that loop; with virtual time if it is given.

    uvloop has a clock of its own: for virtual time it is asyncio's loop that runs.
    """
    # With many handlers that wait, trio makes objects so fast that the default of 700 spends a good
    # part of a core on collections. 1,000 that begin together make 41,000 that live as long, and on
    # asyncio 26,000: where that is more than this, each wave of them is looked at for nothing.
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    if virtual is not None:
        from vmibridge.aio.clock import virtual_loop

        backend, options = virtual_loop("trio" if loop == "trio" else "asyncio", virtual)
        return anyio.run(main, backend=backend, backend_options=options)
    return anyio.run(
        main,
        backend="trio" if loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if loop == "uvloop" else {},
    )


def run_telling(
    loop: Loop, main: Callable[[], Awaitable[R]], health: "Health", path: str | None
) -> R:
    """As `run_on`, and tell of `health` meanwhile: at the socket `path`, and to systemd.

    Raises `ConfigError`, too, where that socket cannot be had.
    """
    from vmibridge.health.notices import Notices
    from vmibridge.health.reporting import run_reporting

    notices = Notices.taken_from(os.environ)
    telling = partial(run_reporting, main, health, path=path or None, notices=notices)
    return run_on(loop, telling)


def prints_beside(*, json: bool) -> AbstractContextManager[object]:
    """What handlers print goes to standard error where standard output is JSON, for the block."""
    return redirect_stdout(sys.stderr) if json else nullcontext()


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
