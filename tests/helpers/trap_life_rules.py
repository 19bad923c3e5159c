"""The life of a trap: what must follow from what can be seen.

A trap is taken, a handler begins or ends, a reply is written: all that `Requests` knows of a
request, it has from there. Where two things race, either may win: the keys that this touches are
*unsure* from there on, and only what holds for all traps is checked.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import chain

from trap_life_asks import (
    IN_FLIGHT,
    RESULT_TIMEOUT,
    SERIAL,
    VCPUS,
    Ask,
    Fate,
    Kind,
    Manner,
    Reply,
    Request,
    Run,
    Trap,
)

from vmibridge import (
    BridgeContext,
)


class Requests:
    """The rules for traps and requests, followed by what is seen of them."""

    def __init__(self, manners: list[Manner]):
        self.manners = manners
        self.now: Callable[[], float] = lambda: 0.0
        self.faults: list[str] = []
        self.traps: dict[int, Trap] = {}
        self.runs: list[Run] = []
        self.passed: dict[BridgeContext, Run] = {}
        """Those that the dispatcher has begun, and the handler goes on with."""
        self.pending: dict[Ask, list[Request]] = defaultdict(list)
        """Those that were told to wait after their handler had begun."""
        self.unsure: set[Ask] = set()
        self.told = self.collected = self.uncollected = 0
        self.ending = self.guest_gone = False
        self.stopped_at = math.inf
        self.reading = True
        self.accessing: Callable[[Ask], bool] = lambda ask: False

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def of_key(self, ask: Ask) -> list[Trap]:
        """The traps of a key that a request of it may wait with."""
        return [
            trap
            for trap in self.traps.values()
            if trap.open and trap.ask == ask and trap.fate is not None and not trap.left
        ]

    @property
    def alive(self) -> list[Run]:
        """Handlers that have begun and not ended, those that unwind included."""
        passed = self.passed.values()
        return [run for run in self.runs if not run.ended and run not in passed]

    # What is seen.

    def taken(self, trap: Trap) -> None:
        """A worker has it. Now it is decided what it is."""
        if trap.taken is not None or trap.reply is not None:
            return self.fault(f"{trap} was taken twice, or after its reply")
        trap.taken = self.now()
        if trap.kind is not Kind.OURS:
            return None
        if self.ending or self._in_a_race(trap.ask):
            self.unsure.add(trap.ask)
        pending = self.pending[trap.ask]
        attached = sum(each.fate is Fate.RETRY for each in self.of_key(trap.ask))
        if not pending:
            trap.fate = Fate.NEW
            trap.request = Request(trap.ask, trap.taken)
        else:
            trap.fate = Fate.RETRY if len(pending) > attached else Fate.TOO_MANY
        return None

    def begins(self, trap: Trap) -> Run:
        """A handler begins."""
        if trap.reply is not None:
            self.fault(f"a handler began for {trap}, which is answered")
        if trap.request is not None and trap.request.run is not None:
            self.fault(f"a handler began twice for {trap}")
        if trap.fate is not Fate.NEW:
            if trap.ask not in self.unsure:
                self.fault(f"{trap} is a retry, and ran the handler again")
            trap.fate = Fate.NEW
            trap.request = Request(trap.ask, self.now() if trap.taken is None else trap.taken)
        assert trap.request is not None
        number = len(self.runs)
        manner = self.manners[number % len(self.manners)]
        run = trap.request.run = Run(number, trap.ask, trap.request, manner)
        if trap.ask.request == SERIAL and any(r.ask.request == SERIAL for r in self.alive):
            self.fault(f"two runs of the serial handler at a time, the second for {trap}")
        self.runs.append(run)
        return run

    def waits(self) -> None:
        """A handler is about to be suspended."""
        if len(self.alive) > IN_FLIGHT:
            self.fault(f"{len(self.alive)} handlers wait, {IN_FLIGHT} may")

    def replied(self, trap: Trap, reply: Reply, run: Run | None) -> None:
        """The server gives a reply."""
        if trap.reply is not None:
            return self.fault(f"{trap} was answered again: {reply}")
        if not trap.put:
            return self.fault(f"{trap} was answered, and is not the server's")
        for earlier in self.traps.values():
            if earlier.seq < trap.seq and earlier.vcpu == trap.vcpu and earlier.open:
                self.fault(f"{trap} was answered before {earlier}")
        trap.reply = reply
        if trap.kind is not Kind.OURS:
            return self._others(trap, reply)
        if reply is Reply.WAIT:
            return self._told_to_wait(trap)
        if reply is Reply.RESULT and run is not None:
            return self._result(trap, run)
        if reply is Reply.FALLBACK:
            return self._fallback(trap)
        return self.fault(f"{trap} is ours, and got {reply}")

    def _others(self, trap: Trap, reply: Reply) -> None:
        allowed = {
            Kind.NATIVE: {Reply.NATIVE},
            Kind.DENIED: {Reply.NATIVE},
            Kind.UNMATCHED: {Reply.MOVED_ON},
            Kind.REAL_MODE: {Reply.MOVED_ON, Reply.FALLBACK},
        }[trap.kind]
        drained = self.ending and trap.kind is not Kind.NATIVE and reply is Reply.FALLBACK
        if reply not in allowed and not drained:
            self.fault(f"{trap} got {reply}")

    def _told_to_wait(self, trap: Trap) -> None:
        if trap.fate is Fate.TOO_MANY:
            return
        if trap.taken is None or (
            self.now() < trap.taken + trap.ask.terms.soft and trap.ask not in self.unsure
        ):
            self.fault(f"{trap} was told to wait before its soft deadline")
        self._leaves(trap)

    def _leaves(self, trap: Trap) -> None:
        if trap.left:
            return
        trap.left = True
        if trap.request is not None and trap.request.run is not None:
            self.pending[trap.ask].append(trap.request)
            self.told += 1

    def _result(self, trap: Trap, run: Run) -> None:
        if run.ask != trap.ask:
            return self.fault(f"{trap} got the result of another request, {run.ask}")
        if not run.answered:
            self.fault(f"{trap} got a result from a run that gave none")
        if run.delivered is not None:
            self.fault(f"{trap} got a result that {run.delivered} had got before")
        run.delivered = trap
        if trap.request is not None and trap.request.run is run:
            return None
        if trap.fate is not Fate.RETRY and trap.ask not in self.unsure:
            self.fault(f"{trap} got the result of another trap's request")
        return self._collect(trap, run.request)

    def _collect(self, trap: Trap, request: Request) -> None:
        if request in self.pending[trap.ask]:
            self.pending[trap.ask].remove(request)
            self.collected += 1
        elif trap.ask not in self.unsure:
            self.fault(f"{trap} got a result that is no longer kept")

    def _fallback(self, trap: Trap) -> None:
        now = self.now()
        if trap.fate is Fate.RETRY:
            pending = self.pending[trap.ask]
            ready = [request for request in pending if request.fruitless(now)]
            if not ready and self.ending:
                ready = pending
            if ready:
                return self._collect(trap, ready[0])
        elif trap.request is not None and trap.request.fruitless(now):
            return None
        if not (self.ending or trap.ask in self.unsure):
            self.fault(f"{trap} got the fallback without a reason")
        return None

    def _in_a_race(self, ask: Ask) -> bool:
        """Whether something is due for this key that may have happened, or not yet."""
        now = self.now()
        if any(
            now >= trap.taken + min(ask.terms)
            or (trap.request is not None and trap.request.overdue(now))
            for trap in self.of_key(ask)
            if trap.taken is not None
        ):
            return True
        results = 0
        for request in chain.from_iterable(self.pending.values()):
            if (request.run is not None and request.run.ended) or request.kept is not None:
                results += 1
            if request.ask == ask and (
                request.overdue(now)
                or (request.kept is not None and now >= request.kept + RESULT_TIMEOUT)
            ):
                return True
        return results > IN_FLIGHT

    # What holds whenever the loop has nothing left to do.

    def check(self) -> None:
        now = self.now()
        for run in self.passed.values():
            # Cut off between the dispatcher and the handler.
            run.unwinding = run.ended = True
        self.passed.clear()
        for trap in [trap for trap in self.traps.values() if trap.open]:
            if trap.taken is not None and trap.kind is not Kind.OURS:
                self.fault(f"{trap} was taken and is not answered")
            elif trap.taken is not None:
                self._check_open(trap, now)
        for run in self.alive:
            self._check_run(run)
        if not self.ending:
            self._check_results(now)
            if self.reading:
                self._check_lanes()
        assert not self.faults, "\n".join(self.faults)

    def _check_open(self, trap: Trap, now: float) -> None:
        assert trap.taken is not None
        terms = trap.ask.terms
        if now >= trap.taken + terms.hard:
            return self.fault(f"{trap} is held past its hard deadline")
        if now >= trap.taken + terms.soft:
            # Only an access to the memory of its vCPU may hold it longer.
            if not self.accessing(trap.ask):
                return self.fault(f"{trap} is held past its soft deadline")
            self._leaves(trap)
            return None
        if trap.fate is Fate.TOO_MANY and trap.ask not in self.unsure:
            self.fault(f"{trap} is to be told to wait, and is not")
        if trap.fate is Fate.RETRY and trap.ask not in self.unsure:
            pending = self.pending[trap.ask]
            if not any(r.run is not None and not r.run.ended for r in pending):
                self.fault(f"{trap} waits for a result that is there")
        if trap.request is not None:
            run = trap.request.run
            if run is not None and run.ended:
                self.fault(f"{trap} is not answered, and its handler has ended")
            elif run is None and trap.ask not in self.unsure and len(self.alive) < IN_FLIGHT:
                others = [r for r in self.alive if r.ask.request == trap.ask.request]
                if trap.ask.request != SERIAL or not others:
                    self.fault(f"{trap} waits for a place, and there is one")
        return None

    def _check_run(self, run: Run) -> None:
        """A handler goes on for somebody, and as far as it can."""
        if self.accessing(run.ask) or run.ask in self.unsure:
            return
        traps = self.of_key(run.ask)
        if self.guest_gone and not run.unwinding and not traps:
            self.fault(f"the guest is gone, and a handler goes on for it: {run.ask}")
        alone = self.pending[run.ask] == [run.request]
        attached = [
            t for t in traps if t.request is run.request or (alone and t.fate is Fate.RETRY)
        ]
        if run.in_memory and attached:
            self.fault(f"a handler waits for memory, and its vCPU stands still: {run.ask}")

    def _check_results(self, now: float) -> None:
        """Results are kept for a while, and only so many."""
        for requests in self.pending.values():
            for request in list(requests):
                run = request.run
                if request.kept is None and run is not None and (run.ended or request.overdue(now)):
                    if run.ended and request.overdue(now):
                        self.unsure.add(request.ask)
                    request.kept = now
                    request.good = run.ended and run.answered
                if request.kept is not None and now >= request.kept + RESULT_TIMEOUT:
                    requests.remove(request)
                    self.uncollected += 1
        kept = [r for requests in self.pending.values() for r in requests if r.kept is not None]
        kept.sort(key=lambda request: request.kept)
        while len(kept) > IN_FLIGHT:
            oldest = kept.pop(0)
            self.unsure.update(r.ask for r in kept if r.kept == oldest.kept)
            self.pending[oldest.ask].remove(oldest)
            self.uncollected += 1

    def _check_lanes(self) -> None:
        for vcpu in range(VCPUS):
            traps = [trap for trap in self.traps.values() if trap.vcpu == vcpu and trap.put]
            if any(trap.reply is not None and trap.written is None for trap in traps):
                continue
            ready = next((trap for trap in traps if trap.reply is None), None)
            if ready is not None and ready.taken is None:
                self.fault(f"{ready} is ready, and nobody takes it")
