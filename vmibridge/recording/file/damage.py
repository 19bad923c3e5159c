"""What is damaged in a file: how it is reported, and how a damaged chunk is skipped.

A damaged chunk costs itself only. Its length may be wrong, too, and reach over sound chunks. It is
believed if the lengths inside agree with it and a record follows. Otherwise reading goes on at the
next place that has the looks and the CRC of a chunk.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from mcap.opcode import Opcode

from vmibridge.recording.file.unpack import CHUNK, FRAME, MAX_RECORD, lengths_agree, unpack
from vmibridge.text import counted

_MAX_SHOWN = 10
"""Problems of a file that are shown to people."""
_MAX_PROBLEMS = 100
_MAX_TEXT = 200
"""Characters of a problem, which may quote the file."""
_MAX_GUESSES = 1000
"""Places that look like a chunk and are none, after which a search is given up."""
_WINDOW = 1 << 20

# "zstd" with its length in front, and the length and the first bytes of the data behind.
MARK = b"\x04\0\0\0zstd"
"""In a chunk that vmibridge has written."""
MARK_AT = FRAME.size + CHUNK.size
"""Bytes from the start of a chunk to its mark."""


class Problem(msgspec.Struct, frozen=True):
    """Something in a file that could not be read."""

    offset: int
    """Where in the file, in bytes."""
    text: str

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.text}"


class Problems:
    """What could not be read: all are counted, the first are kept."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.count: int = 0

    def add(self, offset: int, text: str) -> None:
        """Something at this place of the file. The text may quote the file."""
        self.count += 1
        if len(self.kept) < _MAX_PROBLEMS:
            self.kept.append(Problem(offset, text[:_MAX_TEXT]))


class ChunkSearch:
    """Finds where to go on in one pass over a file; each place is in bytes from its start."""

    def __init__(self, read_at: Callable[[int, int], bytes]) -> None:
        """`read_at` gives at most so many bytes at a place, fewer at the end of the file."""
        self._read_at = read_at
        self._tried = 0
        """Bytes that looked like a chunk and were none."""

    def behind(self, at: int, length: int, file_size: int) -> int:
        """Where to go on behind a damaged chunk, whose record says that it has this length."""
        end = at + FRAME.size + length
        if lengths_agree(self._read_at(at + FRAME.size, length)) and self._is_record(
            end, file_size
        ):
            return end
        return self.next_chunk(at + 1, file_size) or file_size

    def next_chunk(self, start: int, file_size: int) -> int | None:
        """Where the next sound chunk is; `None` where there is none, or none was found in time."""
        guesses = 0
        at = start
        while at < file_size:
            # Longer by a head than the step: a chunk that crosses the border is seen whole.
            window = self._read_at(at, _WINDOW + MARK_AT + len(MARK))
            mark = window.find(MARK, MARK_AT)
            while mark >= 0:
                place = at + mark - MARK_AT
                opcode, length = FRAME.unpack_from(window, mark - MARK_AT)
                room = file_size - place - FRAME.size
                if opcode == Opcode.CHUNK and length <= min(MAX_RECORD, room):
                    try:
                        unpack(self._read_at(place + FRAME.size, length))
                    except ValueError:
                        guesses += 1
                        self._tried += length
                        # True chunks that are damaged do not overlap. False ones that do, and are
                        # large, would each be read and unpacked: the square of the file.
                        if guesses > _MAX_GUESSES or self._tried > file_size:
                            return None
                    else:
                        return place
                mark = window.find(MARK, mark + 1)
            at += _WINDOW
        return None

    def _is_record(self, offset: int, file_size: int) -> bool:
        frame = self._read_at(offset, FRAME.size)
        if len(frame) < FRAME.size:
            return False
        opcode, length = FRAME.unpack(frame)
        fits: bool = 0 < opcode <= Opcode.DATA_END and offset + FRAME.size + length <= file_size
        return fits


def recover_line(path: Path, *, truncated: bool) -> str:
    """What is wrong with a file that has problems, and the command that makes a clean one."""
    what = "truncated" if truncated else "damaged"
    clean = path.with_name(f"{path.stem}-clean.mcap")
    return f"the file is {what}; what can be read of it: vmibridge recover {path} -o {clean}"


def problem_lines(problems: Sequence[object], count: int, where: str = "") -> list[str]:
    """The first ten of `problems`, each behind `where`, and how many more of `count` there are."""
    lines = [f"{where}{problem}" for problem in problems[:_MAX_SHOWN]]
    if count > len(lines):
        lines.append(f"{where}{counted(count - len(lines), 'more problem')}")
    return lines
