"""Which traps of a recording are kept, and in which file: found in a pass of its own.

A request that was told to wait has several traps. If one of them is selected, all are kept; all go
into the file of the first one.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError, RecordingReadError
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.selection import SelectedTraps, Selection
from vmibridge.recording.traps import RecordedTrap
from vmibridge.recording.vm_names import VmNames

__all__ = ["CUT", "MAX_PIECES", "Keeping"]

CUT = 0
"""What `Keeping` has for a trap that is cut; else the number of its file, from 1."""
MAX_PIECES = 250
_MAX_MESSAGES = 1 << 27
"""Of a recording: a byte is held for each."""
_MAX_WAITING = 65_536
"""Requests told to wait that are remembered; a guest need not come back for any."""


class _Request(msgspec.Struct):
    """One that was told to wait."""

    piece: int
    is_selected: bool = False
    places: "array[int]" = msgspec.field(default_factory=lambda: array("Q"))
    """Of its traps, as long as it is not selected."""


class Keeping:
    """One pass over the messages, then an answer for each trap."""

    def __init__(
        self, messages: Iterable[TimedMessage], selection: Selection, every: int | None = None
    ) -> None:
        """`every` are the nanoseconds of a file, where it is split by time.

        Raises `ConfigError` where there would be too many files, `RecordingReadError` where there
        are too many messages.
        """
        self._selection = selection
        self._every = every
        self._pieces = bytearray()
        self._waiting: OrderedDict[tuple[str, int], _Request] = OrderedDict()
        self._names = VmNames()
        self.kept: int = 0
        """Traps."""
        self._start = 0
        self._last_piece = 1
        self._walk(messages)

    def piece_at(self, time: int) -> int:
        """The number of the file of a time, where it is split by time; it is one that a trap has,
        or less."""
        every = self._every or 1
        return min(1 + max(0, time - self._start) // every, self._last_piece)

    def piece_of(self, place: int) -> int:
        """`CUT`, or the number of its file, of the trap at this place among the messages."""
        return self._pieces[place] if place < len(self._pieces) else CUT

    def _walk(self, messages: Iterable[TimedMessage]) -> None:
        selected = SelectedTraps(messages, self._selection, lambda _: None)
        for trap in selected.every():
            if trap.place >= _MAX_MESSAGES:
                raise RecordingReadError(f"more than {_MAX_MESSAGES} messages cannot be edited")
            if trap.place >= len(self._pieces):
                # By more than one at a time: places of traps have gaps.
                self._pieces.extend(bytes(max(4096, trap.place + 1 - len(self._pieces))))
            self._start = selected.start
            self._decide(trap, selected)

    def _decide(self, trap: RecordedTrap, selected: SelectedTraps) -> None:
        start, is_selected = selected.start, selected.takes(trap)
        reply = trap.reply
        first = next((note.retry_of for _, note in trap.notes if note.retry_of is not None), None)
        if reply is not None and reply.retry_of is not None:
            first = reply.retry_of
        waits = reply is not None and reply.kind is OutcomeKind.WAITING
        if first is None and not waits:
            if is_selected:
                self._keep(trap.place, self._piece(trap.time, start))
            return
        key = (self._names.once(trap.event.vm), trap.event.seq if first is None else first)
        request = self._waiting.get(key)
        if request is None:
            request = _Request(self._piece(trap.time, start))
            self._waiting[key] = request
            if len(self._waiting) > _MAX_WAITING:
                self._waiting.popitem(last=False)
        if is_selected and not request.is_selected:
            request.is_selected = True
            for place in request.places:
                self._keep(place, request.piece)
            del request.places[:]
        if request.is_selected:
            self._keep(trap.place, request.piece)
        else:
            request.places.append(trap.place)
        if not waits and reply is not None:
            del self._waiting[key]

    def _keep(self, place: int, piece: int) -> None:
        self._pieces[place] = piece
        self._last_piece = max(self._last_piece, piece)
        self.kept += 1

    def _piece(self, time: int, start: int) -> int:
        if self._every is None:
            return 1
        piece = 1 + max(0, time - start) // self._every
        if piece > MAX_PIECES:
            raise ConfigError(f"--split: there would be more than {MAX_PIECES} files")
        return piece
