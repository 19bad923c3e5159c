"""Retries: a guest was told to wait for its request, and sends it again to get the result.

`Retries` tells whether a trap is a retry and what it gets. `PendingRequests` is the table behind
it: the requests in a state of `request.PENDING`, by their key.

| the request is | a retry |
|---|---|
| `PARKED` | becomes its trap, and waits with its handler |
| `RETRIED` | is told to wait at once: another trap waits already |
| `KEPT` | gets the result; the request is forgotten |

Invariants
----------

- A request is in the table from its first soft deadline until its result has been given to a
  trap or is lost. It runs once, however often the guest asks again.
- Requests with the same key cannot be distinguished. They are kept in their order, and a retry
  is for the first one that no other trap waits for: so each of two vCPUs that ask the same
  gets a result.
- The table is bounded: requests that run by the places of handlers, results by
  `max_results`. Beyond it the oldest one goes, since its guest has had most time to come.
- Nothing here waits, and no clock is read: the times are the caller's.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import msgspec

from vmibridge.bridge.dispatch import Entry
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import retry_key
from vmibridge.engine.request import Cause, Request, State
from vmibridge.engine.settings import ServerSettings, TermsTable
from vmibridge.engine.summary import Summary
from vmibridge.engine.vm_taps import Taps
from vmibridge.vm.conductor import Conductor, with_slack
from vmibridge.vm.trap import TrapEvent


class Retries:
    """What retries of one VM are answered."""

    def __init__(
        self,
        settings: ServerSettings,
        terms: TermsTable,
        summary: Summary,
        taps: Taps | None,
        conductor: Conductor | None = None,
    ) -> None:
        kept = settings.result_timeout
        if conductor is not None:
            kept = with_slack(kept)
        self._conductor = conductor
        self.pending: PendingRequests = PendingRequests(kept, settings.in_flight)
        """Empty while no guest was told to wait: a trap then pays for nothing here."""
        self._terms = terms
        self._summary = summary
        self._taps = taps

    def find(self, event: TrapEvent, packet: BridgePacket, first: Entry) -> Request | None:
        """The request that this trap asks for again; `None`: it is a new request."""
        key = self._key(event, packet, first)
        if self._conductor is None:
            return self.pending.find(key)
        first_seq = self._conductor.retry_of(event)
        return None if first_seq is None else self.pending.of(key, first_seq)

    def join(self, request: Request, retry: Request) -> Outcome[Any] | None:
        """What `retry`, which was taken just now, is answered at once.

        `None`: its trap waits with the handler of `request` from here on.
        """
        event, packet = retry.event, retry.packet
        assert event is not None
        self._summary.retries += 1
        if self._taps is not None:
            self._taps.retried(event, request.first_seq)
        if request.state is State.RETRIED:
            # One trap waits for a handler: two could not both get its answer, and which of them
            # would go without must not depend on when it comes.
            return told_to_wait(request, packet)
        if request.on(Cause.RETRY) is State.COLLECTED:
            self.pending.remove(request)
            return as_retry(request.outcome, packet, request.first_seq)
        retry.on(Cause.JOIN)
        request.event, request.packet, request.started = retry.take_trap(), packet, retry.started
        assert request.worker is not None
        request.worker.context.attach(event)
        return None

    def park(self, request: Request) -> TrapEvent:
        """Its soft deadline has passed: take its trap, which the caller answers WAIT."""
        assert request.event is not None
        if request.state is State.RUNNING:
            # At its first soft deadline only: what tells it from others is that first trap.
            key = self._key(request.event, request.packet, request.first)
            self.pending.add(key, request, request.event.seq)
        request.on(Cause.SOFT_DEADLINE)
        return request.take_trap()

    def keep(self, request: Request, outcome: Outcome[Any], now: float) -> None:
        """Keep the result of a request that is `KEPT` now."""
        self._summary.uncollected += self.pending.keep(request, outcome, now)

    def expire(self, now: float) -> None:
        """Drop the results that no retry came for in time; at `math.inf`, all of them."""
        self._summary.uncollected += self.pending.expire(now)

    def _key(self, event: TrapEvent, packet: BridgePacket, first: Entry) -> Hashable:
        # The VM is that of this table.
        values = packet.values
        retry_values = self._terms.of(first, packet.method).retry_values
        return *retry_key(event, packet), *[values[at - 1] for at in retry_values]


class PendingRequests:
    """The table of the requests of one VM that were told to wait."""

    def __init__(self, result_timeout: float, max_results: int) -> None:
        self._result_timeout = result_timeout
        self._max_results = max_results
        self.by_key: dict[Hashable, list[Request]] = {}
        # All are kept for the same time, so the first one is the first to expire.
        self._results: OrderedDict[Request, None] = OrderedDict()

    @property
    def next_expiry(self) -> float:
        """When the first result expires, on the clock of `keep`; infinite without results."""
        first = next(iter(self._results), None)
        return math.inf if first is None else first.expires

    def add(self, key: Hashable, request: Request, seq: int) -> None:
        """A request, which came with trap `seq`, is told to wait for the first time."""
        request.key, request.first_seq = key, seq
        self.by_key.setdefault(key, []).append(request)

    def find(self, key: Hashable) -> Request | None:
        """Which request this retry is for: the first that no other trap waits for, if any."""
        requests = self.by_key.get(key)
        if requests is None:
            return None
        for request in requests:
            if request.state is not State.RETRIED:
                return request
        return requests[0]

    def of(self, key: Hashable, seq: int) -> Request | None:
        """The request that came with trap `seq`, if it is kept."""
        for request in self.by_key.get(key, ()):
            if request.first_seq == seq:
                return request
        return None

    def keep(self, request: Request, outcome: Outcome[Any], now: float) -> int:
        """Keep the result of a request in state KEPT. Returns how many older ones had to go."""
        request.outcome = outcome
        request.expires = now + self._result_timeout
        self._results[request] = None
        if len(self._results) <= self._max_results:
            return 0
        self._drop(next(iter(self._results)))
        return 1

    def remove(self, request: Request) -> None:
        """It was answered, or its guest has ended and cannot ask again."""
        self._results.pop(request, None)
        requests = self.by_key[request.key]
        requests.remove(request)
        if not requests:
            del self.by_key[request.key]

    def expire(self, now: float) -> int:
        """Drop the results that were not collected in time; returns how many."""
        before = len(self._results)
        while (first := next(iter(self._results), None)) is not None and first.expires <= now:
            self._drop(first)
        return before - len(self._results)

    def _drop(self, request: Request) -> None:
        request.on(Cause.EXPIRE)
        self.remove(request)


def told_to_wait(request: Request, packet: BridgePacket) -> Outcome[Any]:
    """The outcome of a trap that does not wait for its handler any longer."""
    entry = request.entry
    response = entry.contract.stamp(request.terms.wait) if entry.stamps else request.terms.wait
    return Outcome(OutcomeKind.WAITING, packet, response, entry.name, retry_of=request.retry_of)


def as_retry(outcome: Outcome[Any], packet: BridgePacket, first_seq: int) -> Outcome[Any]:
    """The outcome of a retry that gets what its request came to."""
    return msgspec.structs.replace(outcome, packet=packet, retry_of=first_seq)
