"""What each format of an export does, and what they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.traps import RecordedTrap

_MASK64 = (1 << 64) - 1
_MAX_NAMES = 65_536


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the files, whole or not."""

    def hear(self, message: Session | Note) -> None:
        """What the recording has beside traps."""

    def other(self, place: int, timed: TimedMessage) -> None:
        """A message that belongs to no trap, with its place among all of the recording."""

    @abstractmethod
    def add(self, trap: RecordedTrap, start: int) -> None:
        """Write a trap. `start` is when the first one of the recording was taken."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is held."""


class MethodNames:
    """What requests are called, by the sessions of a recording."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, int], str] = {}

    def learn(self, session: Session) -> None:
        """Take the handlers of one VM."""
        for handler in session.handlers:
            for method in handler.methods:
                if len(self._names) < _MAX_NAMES:
                    self._names[session.vm, handler.name, method.code] = method.name

    def of(self, trap: RecordedTrap) -> str:
        """`handler/method`, or the codes where no handler took it."""
        packet, reply = trap.packet, trap.reply
        if packet is None:
            return trap.event.reason.value
        if reply is None or reply.handler is None:
            return f"{packet.request:#06x}/{packet.method:#06x}"
        name = self._names.get((trap.event.vm, reply.handler, packet.method))
        return f"{reply.handler}/{f'{packet.method:#06x}' if name is None else name}"


def unsigned(value: int) -> int:
    """The 64 bits of a number: a recording may hold a negative one, where none should be."""
    return value & _MASK64


def signed(value: int) -> int:
    """The same bits as two's complement."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
