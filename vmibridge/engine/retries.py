"""Requests that were told to wait, until a retry has collected their result.

| state | `running` | `outcome` | a retry |
|---|---|---|---|
| running | the worker | none | waits with it, if no other trap does |
| done | none | the result | gets the result, and the request is forgotten |

Two requests with the same key are told apart by nothing; they are kept in their order. A
request runs once, however often the guest retries. Running ones are bounded by the places
that handlers have, results by `most_results`: beyond it the oldest goes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from vmibridge.bridge.outcome import Outcome

W = TypeVar("W")


class PendingRequest(Generic[W]):
    """One request that was told to wait."""

    __slots__ = ("expires", "key", "outcome", "running", "seq")

    def __init__(self, key: Hashable, running: W, seq: int) -> None:
        self.key: Hashable = key
        self.seq: int = seq
        """Of the trap that it came with."""
        self.running: W | None = running
        self.outcome: Outcome[Any] | None = None
        self.expires: float = 0.0


class PendingRequests(Generic[W]):
    """The table of them, for one VM. `attended` tells whether a trap waits with a worker."""

    def __init__(
        self, result_timeout: float, most_results: int, attended: Callable[[W], bool]
    ) -> None:
        self._result_timeout = result_timeout
        self._most_results = most_results
        self._attended = attended
        self._requests: dict[Hashable, list[PendingRequest[W]]] = {}
        # All are kept for the same time, so the first one is the first to expire.
        self._results: OrderedDict[PendingRequest[W], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def next_expiry(self) -> float:
        """When the first result expires, on the clock of `keep`; infinite without results."""
        first = next(iter(self._results), None)
        return math.inf if first is None else first.expires

    def add(self, key: Hashable, running: W, seq: int) -> PendingRequest[W]:
        """A worker's request, which came with trap `seq`, was told to wait."""
        request = PendingRequest(key, running, seq)
        self._requests.setdefault(key, []).append(request)
        return request

    def find(self, key: Hashable) -> PendingRequest[W] | None:
        """Which request this retry is for: the first that no other trap waits for, if any."""
        requests = self._requests.get(key)
        if requests is None:
            return None
        for request in requests:
            if request.running is None or not self._attended(request.running):
                return request
        return requests[0]

    def keep(self, request: PendingRequest[W], outcome: Outcome[Any], now: float) -> int:
        """Its worker is done: keep the result. Returns how many older ones had to go."""
        request.running = None
        request.outcome = outcome
        request.expires = now + self._result_timeout
        self._results[request] = None
        if len(self._results) <= self._most_results:
            return 0
        self.remove(next(iter(self._results)))
        return 1

    def remove(self, request: PendingRequest[W]) -> None:
        """It was collected, or has nobody any more who would."""
        self._results.pop(request, None)
        requests = self._requests[request.key]
        requests.remove(request)
        if not requests:
            del self._requests[request.key]

    def expire(self, now: float) -> int:
        """Forget the results that nobody collected in time; returns how many."""
        before = len(self._results)
        while (first := next(iter(self._results), None)) is not None and first.expires <= now:
            self.remove(first)
        return before - len(self._results)

    def drop_results(self) -> int:
        """Nobody will collect any more; returns how many there were."""
        return self.expire(math.inf)
