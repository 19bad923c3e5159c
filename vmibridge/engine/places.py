"""How many handlers may be under way at a time: in all, in one VM, of one kind.

A handler that answers without waiting never overlaps with another one, so it takes no
place. The others take one in their VM and one in the server, first come, first served,
and hold it until they have unwound: a handler that was cancelled and does not end still
counts. A serial handler has a turn of its own before that.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import anyio

from vmibridge.bridge.handler import BridgeHandler


class InFlight:
    """The places of one VM, or of a server: `above` is what it shares with others."""

    def __init__(self, most: int, above: "InFlight | None" = None) -> None:
        self.free: int = most
        """Places that are not held; one that is handed on is held all the time."""
        self._above = above
        self._line: deque[anyio.Event] = deque()

    @property
    def full(self) -> bool:
        """Whether one more has to wait."""
        return not self.free or (self._above is not None and not self._above.free)

    async def enter(self) -> None:
        """Take a place, and wait for it. If cancelled, takes none."""
        # That of the VM first: a VM that is full must not hold places of the server while it waits.
        if self.free:
            self.free -= 1
        else:
            turn = anyio.Event()
            self._line.append(turn)
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set():
                    # Cancelled with the place already its own: kept, it would be lost for good.
                    self._hand_on()
                else:
                    self._line.remove(turn)
                raise
        if self._above is not None:
            try:
                await self._above.enter()
            except BaseException:
                self._hand_on()
                raise

    def enter_nowait(self) -> None:
        """Take a place. Raises `anyio.WouldBlock` when it is full."""
        if self.full:
            raise anyio.WouldBlock
        self.free -= 1
        if self._above is not None:
            self._above.enter_nowait()

    def leave(self) -> None:
        """Give the place to the request that has waited longest."""
        self._hand_on()
        if self._above is not None:
            self._above.leave()

    def _hand_on(self) -> None:
        # Not by way of `free`: one that comes before the woken task runs would overtake the line.
        if self._line:
            self._line.popleft().set()
        else:
            self.free += 1


class Turns:
    """The turns of serial handlers; a shared one has the same turn in all VMs."""

    def __init__(self) -> None:
        self._locks: dict[BridgeHandler[Any], anyio.Lock] = {}

    def of(self, handler: BridgeHandler[Any]) -> anyio.Lock:
        """Held while this handler answers."""
        lock = self._locks.get(handler)
        if lock is None:
            lock = self._locks[handler] = anyio.Lock(fast_acquire=True)
        return lock

    def forget(self, handlers: Iterable[BridgeHandler[Any]]) -> None:
        """They are not asked any more."""
        for handler in handlers:
            self._locks.pop(handler, None)
