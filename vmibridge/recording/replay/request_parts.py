"""What few requests of a replay have: calls of `vmi.outside`, accesses that are kept, and memory
that is known from other accesses only."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from vmibridge.recording.messages import MemoryAccess, Outside
from vmibridge.recording.replay.compare import FieldDifference

__all__ = ["NO_CALL", "KeptAccesses", "RequestOutside", "composed"]

NO_CALL = "no call"
_CALLED = "it is not in the recording, and was called"
_NOT_MADE = "in the recording, and not called"


class RequestOutside(msgspec.Struct):
    """The calls of `vmi.outside` of one request, by key and number."""

    recorded: dict[tuple[str, int], Outside] = {}
    """Those that were read, and are not made yet."""
    waiting: set[tuple[str, int]] = set()
    """Those that are made, and wait for what is recorded."""
    awaited: tuple[str, int] | None = None
    """What the walk waits for."""
    called: list[str] = []
    """Keys of those that are not in the recording, and whose functions were called."""
    left: list[str] = []
    """Keys of those that were recorded and are not made."""
    asked: dict[str, int] = {}
    """How many were made, by key: they are numbered from 0."""
    made: set[tuple[str, int]] = set()
    """Those that came to what they came to then, and where they did; where all are kept."""
    others: list[Outside] = []
    """Other ones, where all are kept: they have places of their own."""
    given: int = 0
    """How many have ended."""
    read_at: dict[tuple[str, int], tuple[int, ...]] = {}
    """How far its handler was when the walk came to each, where all are kept."""

    def compare(
        self, differences: Sequence[FieldDifference], *, strict: bool
    ) -> Sequence[FieldDifference]:
        """All that differs, `differences` included: calls that were made then and are not now; and
        others, in front: they may be the cause of all else that differs."""
        if self.called and (strict or differences or self.left):
            told = (
                FieldDifference("outside", NO_CALL, f"{key!a}: {_CALLED}") for key in self.called
            )
            differences = (*told, *differences)
        if not self.left:
            return differences
        keys = ", ".join(
            ascii(key) if count == 1 else f"{key!a} ({count} times)"
            for key, count in Counter(self.left).items()
        )
        expected = f"{keys}: {_NOT_MADE}"
        for place, each in enumerate(differences):
            if each.field == "outside":
                # One that was called or refused may stand for them.
                told_of = msgspec.structs.replace(each, expected=expected)
                return (*differences[:place], told_of, *differences[place + 1 :])
        return (FieldDifference("outside", expected, NO_CALL), *differences)


class KeptAccesses(msgspec.Struct):
    """The accesses of one request that are made now, where all are kept."""

    places: list[int] = []
    """Where the recorded ones stand in the file."""
    there: set[int] = set()
    """Those that stay there, by their numbers."""
    others: list[MemoryAccess] = []
    """Those that do not, and those that are not recorded."""
    latest: int = -1
    """The place of the last one that was made."""


def composed(accesses: Iterable[MemoryAccess], address: int, size: int) -> bytes | None:
    """The bytes there, put together from accesses: those that come first tell. `None`: they do not
    tell of each."""
    found, known = bytearray(size), bytearray(size)
    for access in accesses:
        data = access.data
        if data is None or access.error is not None:
            continue
        first = max(address, access.address)
        last = min(address + size, access.address + len(data))
        for at in range(first, last):
            if not known[at - address]:
                found[at - address] = data[at - access.address]
                known[at - address] = 1
    return bytes(found) if all(known) else None
