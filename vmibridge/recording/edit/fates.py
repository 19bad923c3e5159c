"""What becomes of each trap, for as long as something may name it.

| a trap is | remembered |
|---|---|
| without a reply | until it comes, however many traps lie between |
| told to wait | until the last reply of its request |
| replied to | as one of the last ones: what a handler does late may name it |
"""

from collections import OrderedDict
from typing import TypeAlias

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.messages import Reply

__all__ = ["Fate", "Fates"]

_MAX_OPEN = 65_536
"""Of each kind; a file may have any number without a reply."""
_MAX_LATE = 4096

_Key: TypeAlias = tuple[str, int]


class Fate(msgspec.Struct):
    """Of a trap, and of all that belongs to it."""

    piece: int
    """The number of its file, or `keeping.CUT`."""
    left_out: frozenset[str]


class Fates:
    """By VM and number."""

    def __init__(self) -> None:
        self._open: OrderedDict[_Key, Fate] = OrderedDict()
        self._waiting: OrderedDict[_Key, Fate] = OrderedDict()
        self._late: OrderedDict[_Key, Fate] = OrderedDict()

    def begin(self, vm: str, seq: int, fate: Fate) -> None:
        """A trap was taken."""
        _put(self._open, (vm, seq), fate, _MAX_OPEN)

    def of(self, vm: str, seq: int) -> Fate | None:
        """That of a trap; `None`: it is not known."""
        key = (vm, seq)
        return self._open.get(key) or self._waiting.get(key) or self._late.get(key)

    def end(self, vm: str, reply: Reply) -> None:
        """A trap was replied to."""
        key = (vm, reply.seq)
        fate = self._open.pop(key, None)
        if fate is None:
            return
        if reply.kind is not OutcomeKind.WAITING:
            asked = (vm, reply.seq if reply.retry_of is None else reply.retry_of)
            first = self._waiting.pop(asked, None)
            if first is not None:
                _put(self._late, asked, first, _MAX_LATE)
        elif reply.retry_of is None:
            _put(self._waiting, key, fate, _MAX_OPEN)
            return
        _put(self._late, key, fate, _MAX_LATE)


def _put(fates: "OrderedDict[_Key, Fate]", key: _Key, fate: Fate, most: int) -> None:
    fates[key] = fate
    if len(fates) > most:
        fates.popitem(last=False)
