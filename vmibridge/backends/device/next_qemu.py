"""Who connects while a QEMU is served: with `stay` the next one, if the one before it ends now."""

import socket
from collections.abc import Callable
from typing import Final

import anyio
from anyio.abc import TaskGroup

from vmibridge.backends.device.connection import Connection
from vmibridge.backends.device.turned_away import TurnedAway

__all__ = ["NextQemu"]

_ENDS: Final = 1.0
"""Seconds that another QEMU waits for the end of the one before it."""
_LOOK: Final = 0.01
"""Seconds from one look at that to the next."""


class NextQemu:
    """Those of one listener. `served`: the connection that is served now."""

    def __init__(self, turned_away: TurnedAway, served: Callable[[], Connection | None]) -> None:
        self._turned_away = turned_away
        self._served = served
        self._waits: socket.socket | None = None

    def take(self, connected: socket.socket, before: Connection, tasks: TaskGroup) -> None:
        """Own this socket, which has come while `before` is served, in a task of the group."""
        if self._waits is not None:
            self._turned_away.take(connected, tasks)
            return
        self._waits = connected
        tasks.start_soon(self._wait, connected, before, tasks)

    def pop(self) -> socket.socket | None:
        """Who waits, now that nobody is served; the caller owns it."""
        connected, self._waits = self._waits, None
        return connected

    def close(self) -> None:
        """Nobody is served any more."""
        if (connected := self.pop()) is not None:
            connected.close()

    async def _wait(self, connected: socket.socket, before: Connection, tasks: TaskGroup) -> None:
        # The socket of a QEMU may be closed a moment after its process was waited for. When it has
        # hung up, what serves it takes who waits, however long that takes.
        with anyio.move_on_after(_ENDS):
            while self._served() is before and not before.has_hung_up:  # noqa: ASYNC110 - the end has no event
                await anyio.sleep(_LOOK)
            return
        if self._waits is connected:
            self._waits = None
            self._turned_away.take(connected, tasks)
