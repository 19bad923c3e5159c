"""What taps see of the session of a remote VM: each change once, in its order.

- Handlers of one VM may have been reloaded, and then there are the taps of several handler sets.
  Only the last one is called: a tap that all of them have in common sees each change once.
- An agent may come, go, and come again while its handlers are still being entered. What was before
  the first tap is summed up for it, so that nothing is kept that a peer could make grow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import msgspec

from vmibridge.vm.backend import SessionEvent, SessionEventKind

OnSessionEvent: TypeAlias = Callable[[SessionEvent], None]

_CONNECTED, _BACK = SessionEventKind.CONNECTED, SessionEventKind.BACK


class SessionEvents:
    """The events of one session."""

    def __init__(self) -> None:
        self.last: SessionEvent | None = None
        self._listeners: list[OnSessionEvent] = []
        self._was_watched = False

    def add(self, event: SessionEvent) -> None:
        """It happened now."""
        self.last = event
        if self._listeners:
            self._listeners[-1](event)

    @contextmanager
    def watched(self, on_event: OnSessionEvent | None) -> Iterator[None]:
        """Report what happens in the block; first the state so far, unless a tap has seen it."""
        if on_event is None:
            yield
            return
        if not self._was_watched and self.last is not None:
            on_event(msgspec.structs.replace(self.last, kind=_CONNECTED, reason=None))
            if self.last.kind not in (_CONNECTED, _BACK):
                on_event(self.last)
        self._was_watched = True
        self._listeners.append(on_event)
        try:
            yield
        finally:
            self._listeners.remove(on_event)
