"""What few requests of a replay have: calls of `vmi.outside`, and accesses that are kept."""

import msgspec

from vmibridge.recording.messages import MemoryAccess, Outside

__all__ = ["KeptAccesses", "RequestOutside"]


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
    read_at: dict[tuple[str, int], int] = {}
    """How many steps its handler had made when the walk came to each, where all are kept."""


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
