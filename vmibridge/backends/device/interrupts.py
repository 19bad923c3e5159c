"""The guest's interrupts: an eventfd for each vector that its driver has enabled.

What comes from QEMU is kept only if it is an eventfd, and is made not to block: a write to another
file might block, or change it.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["Interrupts"]

_EVENTFD: Final = "anon_inode:[eventfd]"


class Interrupts:
    """The eventfds of one device, which it owns."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}

    def set(self, first: int, count: int, descriptors: Iterable[int]) -> None:
        """Those of so many vectors from the first; vectors without one are not raised any more."""
        for vector in range(first, first + count):
            old = self._events.pop(vector, None)
            if old is not None:
                os.close(old)
        for vector, descriptor in enumerate(descriptors, first):
            if _is_eventfd(descriptor):
                self._events[vector] = descriptor
            else:
                os.close(descriptor)

    def signal(self, slot: int) -> None:
        """Raise that of a slot: a guest may have enabled fewer vectors than there are."""
        event = self._events.get(slot % len(self._events)) if self._events else None
        if event is not None:
            # Full: the interrupt is on its way.
            with suppress(OSError):
                os.eventfd_write(event, 1)

    def close(self) -> None:
        """Close all."""
        for event in self._events.values():
            os.close(event)
        self._events.clear()


def _is_eventfd(descriptor: int) -> bool:
    try:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()) != _EVENTFD:
            return False
        os.set_blocking(descriptor, False)
    except OSError:
        return False
    return True
