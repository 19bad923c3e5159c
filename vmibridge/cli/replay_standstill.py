"""A line on standard error where a replay does not go on, as when a handler waits for ever."""

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Self

from vmibridge.recording.replay.served import ServedRecording

STILL = 10.0
"""Seconds of real time without a step in the file."""


class StandstillNote:
    """Says so in a block, once for each place of the file. `tell` is called in another thread."""

    def __init__(
        self,
        path: Path,
        served: ServedRecording,
        tell: Callable[[str], object],
        seconds: float | None = STILL,
    ) -> None:
        """`seconds`: after which it says so; `None`: never."""
        self._path = path
        self._served = served
        self._tell = tell
        self._seconds = seconds
        self._ended = Event()
        # It ends with the process, too: the replay may be in a handler that blocks.
        self._thread = Thread(target=self._watch, name="vmibridge standstill", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        place, told = -1, -1
        while not self._ended.wait(self._seconds):
            before, place = place, self._served.place
            if place != before or place == told:
                continue
            told = place
            trap = self._served.waits_for
            if trap is not None:
                self._tell(
                    f"{self._path}: the replay has waited for {self._seconds:g} s for the answer"
                    f" to trap {trap.seq} of vm {trap.vm}: --break {trap.seq} shows it, and"
                    " Ctrl-C ends the replay; a handler that may wait for ever needs a timeout"
                )
