"""The memory that call slots are in: a file of no name, for a guest to map.

It is sealed before a VM gets its descriptor: one that could cut it short could kill this process by
SIGBUS. Its pages are given when they are touched, so a large device costs what is used of it.
"""

import fcntl
import mmap
import os
from secrets import randbits
from typing import Self

from vmibridge.backends.device.slots import Limits, Slots, memory_size

__all__ = ["Mailbox"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Mailbox:
    """The descriptor of the memory, and the slots in it; freed at the end of its block.

    Raises `OSError` when there is no memory for it, `ValueError` for a wrong number of slots.
    """

    def __init__(self, slots: int, limits: Limits | None = None) -> None:
        self.size: int = memory_size(slots)
        """Bytes."""
        self.descriptor: int = os.memfd_create(
            "vmibridge-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            os.ftruncate(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.descriptor, self.size)
        except BaseException:
            os.close(self.descriptor)
            raise
        # Another server of the same guest has another generation, as far as can be.
        self.slots: Slots = Slots(
            memoryview(self._mapping), slots, limits, generation=randbits(31) + 1
        )

    def close(self) -> None:
        """Unmap it and close the descriptor; what a VM has mapped stays with the VM."""
        self.slots.release()
        self._mapping.close()
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
