"""The thread beside the event loop, so that a loop that stands still does not hold QEMU's big lock.

A handler that does not await, a debugger, a long collection of garbage: then nobody on the loop
answers QEMU. The thread is idle while there are no calls; while there are, it looks every `hold`.

| state | waits for | then |
|---|---|---|
| idle | the socket, or an eighth of `timeout` | active |
| active | `hold` | acknowledges accesses that have waited so long |
| alone | the socket, or `hold` | takes what came, and acknowledges it at once |

active to alone: what was to be received one `hold` ago still is. Alone to active: the loop has
turned. Active to idle: nothing came for `_QUIET` times `hold`.

It sees the socket empty at least every eighth of `timeout`: see `Connection`.
"""

import select
from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Any, Final, Protocol

from vmibridge.backends.device.stream import MessageStream

__all__ = ["Watch", "Watched"]

_QUIET: Final = 8
_BEAT = 1.0
"""Seconds, without a timeout."""


class Watched(Protocol):
    """What the thread needs of a connection; all but `lock` with the lock held."""

    lock: Lock
    stream: MessageStream
    is_over: bool
    broken: Exception | None
    loop_turns: int

    def take_over(self) -> None:
        """Take what came, and acknowledge all."""

    def acknowledge(self, hold: float) -> None:
        """Acknowledge what has waited for so many seconds."""

    def hang_up(self, error: Exception) -> None:
        """The connection is broken."""

    def deliver_for_thread(self) -> None:
        """On the loop: hand on what was taken."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""

    @property
    def has_news(self) -> bool:
        """Whether there is something to be handed on."""


class Watch:
    """The thread of one connection; `wake` is an eventfd that is set at its end. In seconds."""

    def __init__(self, watched: Watched, wake: int, hold: float, timeout: float) -> None:
        self._watched, self._hold = watched, hold
        self._tick = max(1, round(hold * 1000))
        self._beat = max(self._tick, round((timeout / 8 or _BEAT) * 1000))
        self._sleep, self._both, self._socket = select.poll(), select.poll(), select.poll()
        self._sleep.register(wake, select.POLLIN)
        self._both.register(wake, select.POLLIN)
        for each in (self._both, self._socket):
            each.register(watched.stream.socket, select.POLLIN)
        self._quiet = 0
        self._seen = 0
        """How much had been received at the last look."""
        self._waiting: int | None = None
        """How much had been received when something was left to be received."""
        self._alone: int | None = None
        """How often the loop had turned when it stood still."""
        self._told = -1
        """How often it had turned when it was told of news: once is enough."""

    def run(self, soon: Callable[..., Any]) -> None:
        """Until the connection is over. Blocks; `soon` runs a function on its loop."""
        watched = self._watched
        while True:
            if watched.broken is not None:
                self._sleep.poll(self._beat)
            elif self._alone is not None:
                self._both.poll(self._tick)
            elif self._quiet >= _QUIET:
                self._both.poll(self._beat)
                self._quiet = 0
            else:
                self._sleep.poll(self._tick)
            with watched.lock:
                if watched.is_over:
                    return
                try:
                    if watched.broken is None:
                        self._look()
                except Exception as error:
                    watched.hang_up(error)
                is_new = watched.has_news and self._told != watched.loop_turns
                if is_new:
                    self._told = watched.loop_turns
            if is_new:
                soon(watched.deliver_for_thread)

    def _look(self) -> None:
        watched, before = self._watched, monotonic()
        is_readable = bool(self._socket.poll(0))
        if not is_readable:
            watched.stream.empty_at = before
        is_left = is_readable and self._waiting == watched.stream.receptions
        if self._alone == watched.loop_turns or is_left:
            self._alone = watched.loop_turns
            watched.take_over()
        else:
            self._alone = None
            watched.acknowledge(self._hold)
        is_new = self._waiting_since(is_readable)
        self._quiet = 0 if is_new or not watched.is_idle else self._quiet + 1

    def _waiting_since(self, is_readable: bool) -> bool:
        """Note what is left for the next look; returns whether something came since the last."""
        received = self._watched.stream.receptions
        is_new, self._seen = received != self._seen, received
        self._waiting = received if is_readable else None
        return is_new or is_readable
