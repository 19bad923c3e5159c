"""Telling that a module takes long to load, while it does: it runs what its author wrote.

A reload loads modules on the event loop, so that no handler meets half of them: there a module that
does not come to its end holds up every vCPU, and before a run it looks like a command that hangs.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, get_ident

from vmibridge.text import printable

__all__ = ["told_when_slow"]

log: logging.Logger = logging.getLogger(__name__)

_AFTER = 10.0
"""Seconds to the first line; from each to the next it is twice as long."""


@contextmanager
def told_when_slow(source: str) -> Iterator[None]:
    """Log where this thread is, for as long as the block takes, with more and more time between.

    For code that may block; a thread of its own looks at it, and is gone with the block.
    """
    over = Event()
    watching = Thread(
        target=_watch, args=(get_ident(), source, over), name="vmibridge loading", daemon=True
    )
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _watch(thread: int, source: str, over: Event) -> None:
    began, wait = time.monotonic(), _AFTER
    while not over.wait(wait):
        wait *= 2
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the only way to see a thread
        if frame is not None:
            # There is no line between two of them.
            log.warning(
                "%s takes long to load: at %s:%d, for %.0f s so far",
                printable(source),
                printable(frame.f_code.co_filename),
                frame.f_lineno or frame.f_code.co_firstlineno,
                time.monotonic() - began,
            )
        # It would keep what the module has alive.
        del frame
