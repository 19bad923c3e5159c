"""Guest memory in a file that QEMU shares and that the user has named.

The ranges are those where the file and physical memory are the same on each of QEMU's x86 machines:
see `vmibridge.backends.qemu.ram`. It is read and written, not mapped, like that of `GuestRanges`.
"""

import os
import stat
from typing import Final

from vmibridge.backends.device.memory import GuestRanges
from vmibridge.backends.device.vfio_user import DmaMap

__all__ = ["FileRanges"]

_VIDEO: Final = 0xA_0000
_HIGH: Final = 0x10_0000
_SPLIT: Final = 0x8000_0000


class FileRanges(GuestRanges):
    """The memory of one VM in this file. Raises `OSError`; `ValueError` for what is no file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        # A FIFO would wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or not about.st_size:
                raise ValueError("is not a regular file with bytes in it")
            for start, end in ((0, _VIDEO), (_HIGH, _SPLIT)):
                size = min(end, about.st_size) - start
                if size > 0:
                    mapping = DmaMap(start, size, start, readable=True, writable=True)
                    self.map_file(mapping, os.dup(descriptor))
        except BaseException:
            self.clear()
            raise
        finally:
            os.close(descriptor)
