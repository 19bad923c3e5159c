"""How long a walk over a recording stays at a place of the file (`walk`), and at a time.

Looks and not seconds are counted, as the process may stand still meanwhile.
"""

import math

__all__ = ["CHECK", "Loosening", "Patience"]


_SPIN = 1000
_SPIN_TIME = 0.1
"""So many steps of handlers, between which virtual time has not passed, take so many seconds: a
handler that never waits for anything would let no deadline pass."""
_LEAST = 1e-6
"""Seconds of virtual time that are none."""
_MAX_LOOKS = 100
"""How often a message is looked at again in other turns of the loop."""
CHECK = 0.1
"""Seconds between two looks whether the walk has gone on."""
_STUCK = 10
_STUCK_ELSEWHERE = 100
"""How many in vain mean that it is stuck: by the handler in question, or by another one."""
_LOOSEN = 0.5 + 1 / 8191
"""Seconds that the walk waits for a handler while others are held. No handler sleeps for just as
long: of two timers of one moment it is chance which is first."""
_MAX_LOOSEN = 2 * _LOOSEN
_MAX_LOOSENED = 16
"""How often those go on before a deadline of the one that is waited for may pass."""
_REAL_LOOKS = 5
"""How many looks that is on a clock that goes on while the process, or its loop, stands still."""
_TINY = 1e-9


class Patience:
    """That of one walk. Places count messages."""

    def __init__(self) -> None:
        self._looks = self._looks_at = 0
        self._checks = self._checks_at = 0
        self._check_from = 0.0
        self._steps, self._steps_at = 0, 0.0

    def looks_again(self, place: int) -> bool:
        """Whether to play the message there in a moment, and not at once; not for ever."""
        if self._looks_at != place:
            self._looks, self._looks_at = 0, place
        self._looks += 1
        return self._looks <= _MAX_LOOKS

    def is_stuck(self, place: int, now: float, *, elsewhere: bool) -> bool:
        """Whether the walk has been there for too many checks. `now`: in seconds of its clock;
        `elsewhere`: it waits for another handler than that which is asked for."""
        if self._checks_at != place:
            self._checks, self._checks_at = 0, place
        if now >= self._check_from:
            self._checks += 1
            self._check_from = now + CHECK
        return self._checks > (_STUCK_ELSEWHERE if elsewhere else _STUCK)

    def step(self, now: float) -> float:
        """A handler makes a step that was not recorded; returns the seconds that are to pass."""
        # Each look at a virtual clock may be the least bit later.
        if now > self._steps_at + _LEAST:
            self._steps, self._steps_at = 0, now
        self._steps += 1
        if self._steps < _SPIN:
            return 0.0
        self._steps = 0
        return _SPIN_TIME

    def start_again(self) -> None:
        """It is about to go on."""
        self._checks = 0


class Loosening:
    """When handlers that are held go on all the same, as the one that is waited for does not. Times
    are of the clock of the loop, in seconds."""

    def __init__(self) -> None:
        self.at: float = math.inf
        """When to look again; infinity: nothing is waited for."""
        self.is_real: bool = True
        """Whether that clock is real."""
        self._seconds = _LOOSEN
        self._count = self._looks = 0

    @property
    def is_set(self) -> bool:
        """Whether that is waited for."""
        return self.at != math.inf

    def set(self, now: float) -> None:
        """It is waited for from now on."""
        self._looks = _REAL_LOOKS if self.is_real else 1
        self.at = now + self._seconds / self._looks

    def unset(self) -> None:
        """It is not waited for any more."""
        self.at = math.inf

    def is_due(self, now: float) -> bool:
        """Whether it is time, now that the loop has turned."""
        if now < self.at - _TINY:
            return False
        self._looks -= 1
        if self._looks > 0:
            self.at = now + self._seconds / _REAL_LOOKS
        return self._looks <= 0

    def after(self, now: float) -> float:
        """Seconds until the next look; 0: it is not waited for, or was in vain too often."""
        is_ahead = now < self.at < math.inf and self._count < _MAX_LOOSENED
        return self.at - now if is_ahead else 0.0

    def happens(self) -> None:
        """They go on; the next time it takes longer."""
        self.unset()
        self._count += 1
        self._seconds = min(2 * self._seconds, _MAX_LOOSEN)

    def start_again(self) -> None:
        """Another handler is waited for."""
        self.unset()
        self._seconds, self._count = _LOOSEN, 0
