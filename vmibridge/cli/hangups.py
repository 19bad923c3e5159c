"""SIGHUP to a command that reloads, while it starts: noted, and made good by a reload.

By default it ends a process: a unit that is reloaded right after it was started would be ended,
for as long as Python, the handlers and the listeners take to be there. So this module imports
nothing that takes time, and is called before anything else is.
"""

import signal
import threading
from types import FrameType

__all__ = ["EarlyHangups", "early_hangups", "note_hangups"]


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


def early_hangups() -> EarlyHangups:
    """Those noted so far, and from here on until an event loop handles SIGHUP."""
    handler = signal.getsignal(signal.SIGHUP)
    return handler if isinstance(handler, EarlyHangups) else EarlyHangups()
