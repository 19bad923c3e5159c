"""Guest memory by physical address, by the descriptors that come with DMA_MAP.

| a range | is read and written |
|---|---|
| has the descriptor of a sealed memfd, and is the guest's memory | here, by `pread` and `pwrite` |
| has the descriptor of one that may not be, or none, or another one | through QEMU, by the caller |
| is not there | not at all |

With `share=off` QEMU sends a descriptor as well, but of a file in which the guest's memory is not:
its pages are copies. So what is read through QEMU is compared with the file, until it was the same
and not only zeros (`compare`).

Invariants:

- Nothing is mapped, so nothing that a VM does to its file can kill this process by SIGBUS.
- A descriptor is kept only if it is a memfd that cannot be cut short (`memory-backend-memfd` seals
  its own): any other file might be one whose reads block, and this runs on the event loop.
- Ranges do not overlap, and there are at most `MAX_RANGES`.
- Descriptors are owned here: closed when their range goes.
"""

import errno
import fcntl
import os
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from vmibridge.backends.device.vfio_user import DmaMap
from vmibridge.errors import GuestMemoryError

__all__ = ["MAX_RANGES", "GuestRanges", "Piece"]

MAX_RANGES: Final = 1024
_LAST = 1 << 64


_MAX_DIFFERENT = 8
"""A guest may write between two readings; so often it does not."""


class _Range(NamedTuple):
    mapping: DmaMap
    descriptor: int | None
    file: tuple[int, int]
    """Device and inode."""


class _Readable(NamedTuple):
    """Addresses that are read here."""

    start: int
    end: int
    descriptor: int
    shift: int
    """What makes an address an offset in the file."""


_NOTHING: Final = _Readable(0, -1, -1, 0)


class Piece(NamedTuple):
    """A part of an access that is in one range."""

    address: int
    size: int
    descriptor: int | None
    offset: int
    """Where in the descriptor's file."""
    file: tuple[int, int]
    is_known: bool
    """Whether the file is known to be the guest's memory; if not, through QEMU."""


class GuestRanges:
    """The ranges of one VM."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: dict[int, _Range] = {}
        self._known: set[tuple[int, int]] = set()
        self._different: dict[tuple[int, int], int] = {}
        self._last: _Readable = _NOTHING
        """Where `read` found memory last. It counts until a range goes."""
        self.refused: int = 0
        """Descriptors that were not kept: those ranges are reached through QEMU."""

    def __len__(self) -> int:
        return len(self._starts)

    def map(self, mapping: DmaMap, descriptor: int | None) -> int:
        """Add a range, and take its descriptor over; returns an errno, or 0."""
        at = bisect_right(self._starts, mapping.address)
        end = mapping.address + mapping.size
        why = 0
        if len(self._starts) >= MAX_RANGES:
            why = errno.ENOSPC
        elif (at and self._end(self._starts[at - 1]) > mapping.address) or (
            at < len(self._starts) and self._starts[at] < end
        ):
            why = errno.EEXIST
        file = None if descriptor is None or why else _sealed_file(descriptor, mapping)
        if descriptor is not None and file is None:
            os.close(descriptor)
            descriptor = None
            self.refused += not why
        if not why:
            self._starts.insert(at, mapping.address)
            self._ranges[mapping.address] = _Range(mapping, descriptor, file or (0, 0))
        return why

    def map_file(self, mapping: DmaMap, descriptor: int) -> None:
        """Add a range of a file that is the guest's memory by its user's word.

        It has to be a regular file, and to overlap no other range. Its descriptor is taken over.
        """
        about = os.fstat(descriptor)
        file = about.st_dev, about.st_ino
        self._known.add(file)
        insort(self._starts, mapping.address)
        self._ranges[mapping.address] = _Range(mapping, descriptor, file)

    def unmap(self, address: int, size: int) -> int:
        """Remove a range, which has to be one as it was added; returns an errno, or 0."""
        found = self._ranges.get(address)
        if found is None or found.mapping.size != size:
            return errno.ENOENT
        self._last = _NOTHING
        self._starts.remove(address)
        del self._ranges[address]
        if found.descriptor is not None:
            os.close(found.descriptor)
        return 0

    def clear(self) -> None:
        """Remove all ranges."""
        self._last = _NOTHING
        for each in self._ranges.values():
            if each.descriptor is not None:
                os.close(each.descriptor)
        self._starts.clear()
        self._ranges.clear()

    def _end(self, start: int) -> int:
        return start + self._ranges[start].mapping.size

    def pieces(self, address: int, size: int, *, write: bool = False) -> Iterator[Piece]:
        """The parts of an access, in their order.

        Raises `GuestMemoryError` where there is no memory, or, for a write, none to be written.
        """
        if not 0 <= address <= _LAST - size:
            raise GuestMemoryError(address, "beyond the physical addresses")
        while size > 0:
            at = bisect_right(self._starts, address) - 1
            start = self._starts[at] if at >= 0 else 0
            if at < 0 or address >= self._end(start):
                raise GuestMemoryError(address, "the VM has no memory there")
            mapping, descriptor, file = self._ranges[start]
            if not (mapping.writable if write else mapping.readable):
                raise GuestMemoryError(address, "the VM's memory is read-only there")
            within = address - start
            part = min(size, mapping.size - within)
            yield Piece(
                address, part, descriptor, mapping.offset + within, file, file in self._known
            )
            address += part
            size -= part

    def read(self, address: int, size: int) -> bytes | None:
        """`size` bytes, if one file has them all; `None`: take the access piece by piece."""
        last = self._last
        if not last.start <= address <= last.end - size:
            last = self._last = self._readable(address)
            if address + size > last.end:
                return None
        try:
            data = os.pread(last.descriptor, size, address + last.shift)
        except OSError:
            return None
        return data if len(data) == size else None

    def _readable(self, address: int) -> _Readable:
        """The range of an address, if it can be read here; else an empty one."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return _NOTHING
        start = self._starts[at]
        mapping, descriptor, file = self._ranges[start]
        if descriptor is None or file not in self._known or not mapping.readable:
            return _NOTHING
        return _Readable(start, start + mapping.size, descriptor, mapping.offset - start)

    def compare(self, piece: Piece, data: bytes) -> bool:
        """What QEMU has for a piece, to learn whether the file has it, too.

        The piece has to be of now. Returns whether it is clear that it has not.
        """
        if piece.descriptor is None or piece.is_known:
            return False
        different = self._different.get(piece.file, 0)
        if different >= _MAX_DIFFERENT:
            return False
        try:
            ours = os.pread(piece.descriptor, len(data), piece.offset)
        except OSError:
            ours = b""
        if ours != data:
            self._different[piece.file] = different + 1
            return different + 1 == _MAX_DIFFERENT
        if any(data):
            self._known.add(piece.file)
        return False


def read_piece(piece: Piece) -> bytes:
    """The bytes of a piece that has a descriptor. Raises `GuestMemoryError`."""
    assert piece.descriptor is not None
    data = b""
    with suppress(OSError):
        data = os.pread(piece.descriptor, piece.size, piece.offset)
    if len(data) != piece.size:
        raise GuestMemoryError(piece.address, "the VM's memory cannot be read there")
    return data


def write_piece(piece: Piece, data: bytes) -> bool:
    """Write a piece that has a descriptor; `False`: not written, ask QEMU (hugetlbfs)."""
    assert piece.descriptor is not None
    try:
        return os.pwrite(piece.descriptor, data, piece.offset) == len(data)
    except OSError:
        return False


def _sealed_file(descriptor: int, mapping: DmaMap) -> tuple[int, int] | None:
    """Device and inode of a memfd that holds the range and cannot be cut short; `None`: no such."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        about = os.fstat(descriptor)
    except OSError:
        return None
    if not seals & fcntl.F_SEAL_SHRINK or mapping.offset + mapping.size > about.st_size:
        return None
    return about.st_dev, about.st_ino
