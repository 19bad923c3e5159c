"""A file that its recorder still writes: how far it can be read.

A chunk that cannot be written is taken back, so nothing is read but whole records.
"""

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from mcap.opcode import Opcode
from mcap.writer import MCAP0_MAGIC

from vmibridge.recording.file.folder import is_locked

__all__ = ["size_with_record"]

_FRAME = struct.Struct("<BQ")


def size_with_record(
    file: BinaryIO, at: int, size: int, max_record: int, wait: Callable[[], object]
) -> int:
    """The size of a file when the record at `at` is whole, or nobody writes the file any more.

    `size` is what is known of its size, `wait` is called before each further look. Raises
    `OSError`.
    """
    fd = file.fileno()
    while not _is_whole(fd, at, size, max_record):
        # In this order: what is written last is seen.
        is_written = is_locked(fd)
        before, size = size, os.fstat(fd).st_size
        if size == before:
            if not is_written:
                break
            wait()
    return size


def _is_whole(fd: int, at: int, size: int, max_record: int) -> bool:
    head = os.pread(fd, _FRAME.size, at)
    if len(head) < _FRAME.size:
        return False
    opcode, length = _FRAME.unpack(head)
    # Behind a footer is the end of the file. A length that is wrong is for the reader to tell.
    end = at + _FRAME.size + length + len(MCAP0_MAGIC) * (opcode == Opcode.FOOTER)
    whole: bool = length > max_record or end <= size
    return whole
