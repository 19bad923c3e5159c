"""Requests of a recording that are not asked, whose retries are not asked either."""

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.messages import Reply

__all__ = ["NotAsked"]

_MAX = 16_384


class NotAsked:
    """Those of one VM that have no final reply yet: each is counted once, with its retries."""

    def __init__(self) -> None:
        self._firsts: dict[int, None] = {}

    def __contains__(self, first: object) -> bool:
        """Whether the request that came with this trap is one."""
        return first in self._firsts

    def add(self, first: int) -> None:
        """One more; the oldest is forgotten where there are too many."""
        self._firsts[first] = None
        if len(self._firsts) > _MAX:
            del self._firsts[next(iter(self._firsts))]

    def hear(self, reply: Reply) -> None:
        """A reply was recorded: the final one is the end of its request."""
        if self._firsts and reply.kind is not OutcomeKind.WAITING:
            self._firsts.pop(reply.seq if reply.retry_of is None else reply.retry_of, None)
