"""Signals to a command while it starts.

SIGHUP to one that reloads is noted, and made good by a reload. By default it ends a process: a unit
that is reloaded right after it was started would be ended, for as long as Python, the handlers and
the listeners take to be there. SIGTERM is handled where the process is the first of a container. So
this module imports nothing that takes time, and is called before anything else is.
"""

import os
import signal
import threading
from types import FrameType

__all__ = ["EarlyHangups", "early_hangups", "end_at_sigterm_as_init", "note_hangups"]


class EarlyHangups:
    """Handles SIGHUP until an event loop does."""

    def __init__(self) -> None:
        self.received: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def note_hangups() -> None:
    """Note SIGHUP from here on. Where it is ignored, as under `nohup`, it stays so for now."""
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGHUP, EarlyHangups())


def end_at_sigterm_as_init() -> None:
    """From here on SIGTERM ends the first process of a container, too, which the system gives no
    signal that it does not handle: a stop would wait until it is killed."""
    if (
        os.getpid() == 1
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    # Not by an exception: a handler module that is being loaded would be what failed.
    os._exit(128 + number)


def early_hangups() -> EarlyHangups:
    """Those noted so far, and from here on until an event loop handles SIGHUP."""
    handler = signal.getsignal(signal.SIGHUP)
    return handler if isinstance(handler, EarlyHangups) else EarlyHangups()
