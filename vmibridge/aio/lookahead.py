"""When the next trap is looked for without a turn of the event loop, and for how long.

A guest that calls again and again does so right after its answer, and a turn of the loop takes as
long as all else that a trap needs. So a backend that has sent an answer polls its socket for the
next trap, for a moment.
That pays only where it comes: after a look in vain the next ones are left out, up to 64 of them.
The loop turns after half a millisecond in any case.
"""

import os
from collections.abc import Callable
from time import monotonic
from typing import Final

__all__ = ["Lookahead"]

_MOMENT: Final = 0.000_15
"""Seconds in which a guest that was answered may trap again."""
_WITHOUT_TURN: Final = 0.000_5
"""Seconds."""
_MAX_LEFT_OUT: Final = 64


class Lookahead:
    """The looks of one connection."""

    def __init__(self) -> None:
        self._turned_at = 0.0
        self._in_vain = self._left_out = 0

    def turned(self) -> None:
        """The loop has turned."""
        self._turned_at = monotonic()

    def look(self, take: Callable[[], bool]) -> bool:
        """Call `take` until it has taken something, or the moment has passed.

        Returns whether it did: not where that was in vain lately, or where the loop has to turn.
        Raises as `take`.
        """
        if self._left_out:
            self._left_out -= 1
            return False
        now = monotonic()
        if now - self._turned_at > _WITHOUT_TURN:
            return False
        while not (taken := take()) and monotonic() - now < _MOMENT:
            # QEMU may have this core only.
            os.sched_yield()
        self._in_vain = 0 if taken else min(2 * self._in_vain + 1, _MAX_LEFT_OUT)
        self._left_out = self._in_vain
        return True
