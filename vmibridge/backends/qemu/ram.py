"""Guest memory in a file that QEMU shares: `memory-backend-file,share=on`.

Reads only: what is written behind QEMU's back misses its dirty log and its translated code.
It is read, not mapped: a file that is cut short under a mapping kills who looks at it.

Read here is what is at the same place in the file and in physical memory, on each of QEMU's
x86 machines (QEMU, hw/i386/pc_piix.c, pc_q35.c, microvm.c):

| physical address | what |
|---|---|
| below 640 KiB | memory |
| to 1 MiB | video memory and firmware: not from the file |
| to 2 GiB | memory |
| above | elsewhere in the file, depending on the machine: not from here |
"""

import os
import stat
from typing import Self

from vmibridge.errors import BackendError

_VIDEO, _HIGH, _SPLIT = 0xA_0000, 0x10_0000, 0x8000_0000


def open_ram(path: str) -> "SharedRam":
    """The memory in this file. Raises `BackendError`."""
    try:
        return SharedRam(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BackendError(f"{path}: {error}") from error


class SharedRam:
    """Memory by a file descriptor, which it owns. Raises `ValueError` for what is no file."""

    def __init__(self, descriptor: int) -> None:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or not about.st_size:
            os.close(descriptor)
            raise ValueError("the memory that a QEMU shares is not a regular file with bytes in it")
        self._descriptor = descriptor
        self._end = min(about.st_size, _SPLIT)

    def read(self, address: int, size: int) -> bytes | None:
        """`size` bytes at a physical address; `None`: ask QEMU."""
        end = address + size
        if end > _VIDEO and (address < _HIGH or end > self._end):
            return None
        try:
            data = os.pread(self._descriptor, size, address)
        except OSError:
            return None
        return data if len(data) == size else None

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
