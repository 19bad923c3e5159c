"""How many handlers may be under way at a time: in all, in one VM, of one kind.

A handler that answers without waiting never overlaps with another one, so it takes no
place. The others take one in their VM and one in the server, first come, first served,
and hold it until they have unwound: a handler that was cancelled and does not end still
counts. A serial handler has a turn of its own before that.
"""

from typing import Any

import anyio

from vmibridge.handler import BridgeHandler


class InFlight:
    """The places of one VM, or of a server: `above` is what it shares with others."""

    def __init__(self, most: int, above: "InFlight | None" = None) -> None:
        self._places = anyio.Semaphore(most, fast_acquire=True)
        self._above = above

    @property
    def full(self) -> bool:
        """Whether one more has to wait."""
        return not self._places.value or (self._above is not None and self._above.full)

    async def enter(self) -> None:
        """Take a place, and wait for it. Cancelled, none was taken."""
        await self._places.acquire()
        if self._above is not None:
            try:
                await self._above.enter()
            except BaseException:
                self._places.release()
                raise

    def enter_nowait(self) -> None:
        """Take a place. Raises `anyio.WouldBlock` when it is full."""
        if self._above is not None:
            self._above.enter_nowait()
        self._places.acquire_nowait()

    def leave(self) -> None:
        """Give the place to whoever has waited longest."""
        self._places.release()
        if self._above is not None:
            self._above.leave()


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
