"""The last moment of a stop: a command that was asked to end has ended by then, whatever it does.

A handler that holds up the event loop lets nothing on it run: no answer, no timer, no clean-up. A
thread that hangs, such as one of a handler that waits for a name server, holds up the end of
Python itself. So the first signal that stops sets a clock in a thread of its own:

| when | what |
|---|---|
| the first signal | the stop begins, on the loop |
| `seconds` later, if it still runs | what there is to save is saved, and the process ends |

What is saved are the recordings: whole, with all that was recorded. The status is that of the
signal: such a stop was not one in good order.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from vmibridge.aio.loops import Soon, loop_door

__all__ = ["STOP_MARGIN", "StopBound"]

log: logging.Logger = logging.getLogger(__name__)

STOP_MARGIN = 10.0
"""Seconds beyond that clock after which a process that is still there is not live any more."""
_EVER = 1e6
"""Seconds: no thread can sleep for ever."""
_TURN = 0.2
"""Seconds for the loop to save it by itself."""
_SAVING = 2.0
"""Seconds for it to be saved: a disk may hang, too."""


class StopBound:
    """For one run of a command, which has `seconds` for a stop; then `save` is called, once.

    `exit_zero`: the status is 0 where the stop itself was in good order, and only the end of the
    process takes so long.
    """

    def __init__(
        self, seconds: float, save: Callable[[], None] = lambda: None, *, exit_zero: bool = False
    ) -> None:
        self._seconds = seconds
        self._save = save
        self._exit_zero = exit_zero
        self._soon: Soon | None = None
        # Its `put` is safe in a signal handler, whatever that has interrupted.
        self._came: SimpleQueue[signal.Signals] = SimpleQueue()
        self._once = threading.Lock()
        self._is_over = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the block, on the event loop: that of what the command does. The clock goes on behind
        it, till the process has ended."""
        self._soon = loop_door()
        threading.Thread(target=self._watch, name="vmibridge stop", daemon=True).start()
        yield
        self._is_over = True

    def begin(self, number: signal.Signals) -> None:
        """A signal has come that stops; the first one counts. In a signal handler, too."""
        self._came.put(number)

    def _watch(self) -> None:
        number = self._came.get()
        time.sleep(min(self._seconds, _EVER))
        status = 0 if self._is_over and self._exit_zero else 128 + number
        # Not after the line below: whoever holds the lock of the log may be what hangs.
        last = threading.Timer(_SAVING, os._exit, (status,))
        last.daemon = True
        # Python 3.12 starts no thread while it ends; by then there is nothing left to be saved.
        with suppress(RuntimeError):
            last.start()
        log.error(
            "%s: not ended after %g s: a handler, or a thread, does not end, so the process does",
            number.name,
            self._seconds,
        )
        try:
            self._save_somewhere()
        finally:
            os._exit(status)

    def _save_somewhere(self) -> None:
        if self._is_over:
            return
        saved = threading.Event()

        def save() -> None:
            if self._once.acquire(blocking=False):
                try:
                    self._save()
                finally:
                    saved.set()

        if self._soon is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._soon(save)
                saved.wait(_TURN)
        save()
        saved.wait()
