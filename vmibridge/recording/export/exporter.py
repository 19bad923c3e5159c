"""What each format of an export does, and what they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.traps import RecordedTrap

_MASK64 = (1 << 64) - 1


class Exporter(ABC):
    """Writes one recording. `with` it; its calls raise `OSError`."""

    suffix: ClassVar[str]

    @classmethod
    def targets(cls, target: Path) -> tuple[Path, ...]:
        """The files that are made of the one that was named."""
        return (target,)

    @classmethod
    @abstractmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """Begin to write, into files that are there and empty."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the files, whole or not."""

    def hear(self, message: Session | Note) -> None:
        """What the recording has beside traps."""

    def other(self, place: int, timed: TimedMessage) -> None:
        """A message that belongs to no trap, with its place among all of the recording."""

    def leave_out(self, trap: RecordedTrap) -> None:
        """A trap is not selected."""

    @abstractmethod
    def add(self, trap: RecordedTrap, start: int) -> None:
        """Write a trap. `start` is when the first one of the recording was taken."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is held."""


class OneFileExporter(Exporter):
    """Writes one binary file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """As of `Exporter`."""
        return cls(paths[0].open("wb"))

    def close(self) -> None:
        self._file.close()


def unsigned(value: int) -> int:
    """The 64 bits of a number: a recording may hold a negative one, where none should be."""
    return value & _MASK64


def signed(value: int) -> int:
    """The same bits as two's complement."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
