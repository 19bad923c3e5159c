"""The fault soak: one run, and the invariants that hold at its end."""

import asyncio
import gc
import logging
import math
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
from soak_guest import Guest
from soak_handlers import Behind, Faults, InTurn, PassesOn, on_trio
from soak_kinds import (
    BURST,
    BYTES_BURST,
    BYTES_RATE,
    DENIED,
    FALLBACK,
    FEWEST_FOR_FLAT,
    FLAT,
    HARD,
    KIND_OF,
    KINDS,
    LONG,
    MAX_SPACES,
    MAX_WRONGS,
    MAY_WAIT,
    RATE,
    REPLY_OF,
    RESULT_TIMEOUT,
    SAMPLES,
    STALLED,
    WARM_UP,
    Kind,
    Reply,
)
from soak_ledger import Ledger, Log
from transitions import watched_states

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeResponse,
    BridgeServer,
    Outcome,
    OutcomeKind,
)
from vmibridge.engine.access_policy import Policy, Quota, Rate
from vmibridge.engine.engine import Engine
from vmibridge.engine.request import Request, Worker
from vmibridge.engine.workers import Workers
from vmibridge.vm.memory import GuestMemory

LOOPS = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


# --- the run ----------------------------------------------------------------------------


class Report(NamedTuple):
    """What a soak came to."""

    loop: str
    seed: int
    lanes: int
    traps: int
    """All of them, with retries and the closing ones."""
    retries: int
    seconds: float
    traps_per_second: float
    outcomes: dict[str, int]
    kinds: dict[str, dict[str, int]]
    planned: dict[str, int]
    uncollected: int
    longest_hang: float
    """Seconds from taking a trap that hangs to its answer: the hard deadline and some."""
    most_tasks: int
    first_half: float
    """MiB: the median of the samples. So is the next."""
    second_half: float
    wrongs: int
    first_wrongs: list[str]


def resident() -> float:
    """MiB of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def tasks_alive() -> int:
    if on_trio():
        import trio

        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


OURS = (BridgeServer, Engine, Workers, Worker, Request, BridgeContext, GuestMemory)


def objects_alive() -> Counter[str]:
    """Workers, requests, contexts: what a run has to leave nothing of."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in OURS)


class Soak:
    """One run. `progress` is called about twice a second with the traps answered so far."""

    def __init__(
        self,
        traps: int,
        lanes: int,
        seed: int,
        loop: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.ledger = Ledger()
        self._traps = traps
        self._lanes = lanes
        self._seed = seed
        self._loop = loop
        self._progress = progress
        self._samples: list[float] = []
        self._next_sample = traps * WARM_UP if traps >= FEWEST_FOR_FLAT else math.inf
        self._most_tasks = 0

    async def run(self) -> Report:
        """The whole soak. Its report tells what was wrong."""
        # By the first wait, a loop has started what it needs for itself.
        await anyio.sleep(0.01)
        threads, tasks, alive = threading.active_count(), tasks_alive(), objects_alive()
        started = time.monotonic()
        with self._logged() as log, watched_states() as states:
            server = await self._serve()
        seconds = time.monotonic() - started
        summary = server.summary
        self._check_counts(summary, log)
        for wrong in states.wrong:
            self.ledger.wrong(f"the state of a request: {wrong}")
        self.ledger.check(bool(states.seen), "no request was seen")
        seen = objects_alive()["Engine"] > alive["Engine"]
        self.ledger.check(seen, "the engine is there, and is not seen in memory")
        del server
        with anyio.move_on_after(5):
            while tasks_alive() > tasks:
                await anyio.sleep(0.01)
        # The loop lets go of what ended last a turn later.
        await anyio.sleep(0.01)
        left = objects_alive() - alive
        check = self.ledger.check
        check(not left, f"left in memory: {dict(left)}")
        check(tasks_alive() <= tasks, f"{tasks_alive() - tasks} tasks are left")
        most = tasks + 4 * self._lanes + 64
        check(self._most_tasks <= most, f"there were {self._most_tasks} tasks, {most} are enough")
        check(
            threading.active_count() <= threads,
            f"threads are left: {threading.enumerate()}",
        )
        return self._report(summary, seconds)

    @contextmanager
    def _logged(self):
        log = Log(self.ledger)
        # Nobody else gets the records: they hold tracebacks, and those a whole run.
        ours = logging.getLogger("vmibridge")
        ours.propagate = False
        loggers = [ours, logging.getLogger("asyncio"), logging.getLogger("trio")]
        for logger in loggers:
            logger.addHandler(log)
        unraisable = sys.unraisablehook
        sys.unraisablehook = lambda what: self.ledger.wrong(f"nobody caught {what.exc_value!r}")
        try:
            yield log
            gc.collect()
        finally:
            sys.unraisablehook = unraisable
            for logger in loggers:
                logger.removeHandler(log)
            ours.propagate = True

    async def _serve(self) -> BridgeServer:
        places = 2 * self._lanes
        quota = self._traps + self._traps // 10 + 20 * self._lanes
        handler = Faults(self.ledger, places, self._lanes)
        guest = Guest(
            self.ledger,
            handler,
            traps=self._traps,
            lanes=self._lanes,
            seed=self._seed,
            quota=quota,
        )
        policy = Policy(
            rings=frozenset({0}),
            vm=Quota(requests=Rate(quota)),
            address_space=Quota(Rate(BURST, RATE), Rate(BYTES_BURST, BYTES_RATE)),
            max_address_spaces=MAX_SPACES,
            denied=BridgeResponse(value1=DENIED),
        )
        async with anyio.create_task_group() as around:
            async with guest:
                server = BridgeServer(
                    guest,
                    Bridge(handler, InTurn(self.ledger), PassesOn(), Behind()),
                    timeout=LONG,
                    result_timeout=RESULT_TIMEOUT,
                    fallback=BridgeResponse(value1=FALLBACK),
                    queue=places,
                    in_flight=places,
                    grace=0.05,
                    stop_timeout=LONG,
                    policy=policy,
                )
                guest.stop_server = server.stop
                guest.uncollected = lambda: server.summary.uncollected
                around.start_soon(self._watch, guest, server)
                async for outcome in server.run():
                    self._look_at(outcome, guest)
            around.cancel_scope.cancel()
        self.ledger.check(guest.done, "the guest was stopped before its end")
        return server

    def _look_at(self, outcome: Outcome, guest: Guest) -> None:
        ledger = self.ledger
        event = outcome.event
        kind = KIND_OF[outcome.packet.method]
        ledger.outcomes[kind, outcome.kind] += 1
        if outcome.kind not in KINDS[kind].outcomes:
            ledger.wrong(f"{kind.name} is {outcome.kind.value}: {outcome.error}")
        lane = guest.lanes[event.vcpu]
        if event.seq <= lane.last_outcome:
            ledger.wrong(f"the outcome of trap {event.seq} comes after {lane.last_outcome}")
        lane.last_outcome = event.seq
        if kind is Kind.HANG:
            ledger.check(outcome.duration >= HARD, f"a hang had only {outcome.duration} s")
            ledger.longest_hang = max(ledger.longest_hang, outcome.duration)
        if guest.in_plan and ledger.answered >= self._next_sample:
            gc.collect()
            self._samples.append(resident())
            self._next_sample += self._traps * (1 - WARM_UP) / SAMPLES

    async def _watch(self, guest: Guest, server: BridgeServer) -> None:
        """Tell of the progress; give up when there is none."""
        before, since = -1, 0.0
        while True:
            answered, now = self.ledger.answered, time.monotonic()
            if answered != before:
                before, since = answered, now
            stalled = now - since > STALLED
            if stalled or self.ledger.wrongs > MAX_WRONGS:
                self.ledger.wrong(f"gave up{' after a standstill' * stalled}: {guest.oldest()}")
                server.stop(now=True)
                return
            self._most_tasks = max(self._most_tasks, tasks_alive())
            if self._progress is not None:
                self._progress(answered)
            await anyio.sleep(0.5)

    def _check_counts(self, summary, log: Log) -> None:
        ledger, check = self.ledger, self.ledger.check
        for kind in Kind:
            replies = Counter({r: n for (k, r), n in ledger.replies.items() if k is kind})
            check(
                replies.total() == ledger.sent[kind],
                f"{kind.name}: {ledger.sent[kind]} sent, {replies.total()} answered",
            )
            told: Counter[Reply] = Counter()
            for (each, outcome), count in ledger.outcomes.items():
                if each is kind:
                    told[Reply.LOST if kind is Kind.LOST else REPLY_OF[outcome]] += count
            if kind is not Kind.NOT_OURS:
                check(told == replies, f"{kind.name}: guest {replies}, outcomes {told}")
        by_outcome: Counter[OutcomeKind] = Counter()
        for (_, outcome), count in ledger.outcomes.items():
            by_outcome[outcome] += count
        counted = Counter(summary.outcomes)
        check(counted == by_outcome, f"counted {counted}, told {by_outcome}")
        native = ledger.sent[Kind.NOT_OURS]
        check(summary.native == native, f"{native} not ours, {summary.native} ran natively")
        # Those that hang at the end are cancelled; behind each there is one more.
        last = ledger.outcomes[Kind.LAST, OutcomeKind.CANCELLED]
        check(last >= self._lanes, f"{last} of {self._lanes} handlers were cancelled by the stop")
        starts, lost = ledger.starts.total(), summary.uncollected + summary.abandoned
        check(
            starts == ledger.ends.total() + lost,
            f"{starts} slow handlers ran, {ledger.ends.total()} were collected, {lost} were not",
        )
        # A retry finds its request, or is a request of its own; one that waited for its turn
        # was told to wait and forgotten.
        denied = sum(ledger.replies[kind, Reply.DENIED] for kind in MAY_WAIT)
        forgotten = ledger.sent_of(MAY_WAIT) - denied - summary.retries - starts
        check(
            0 <= forgotten <= ledger.replies[Kind.TURN_SLOW, Reply.WAIT],
            f"{ledger.sent_of(MAY_WAIT)} asked, {starts} began, {summary.retries} retried, "
            f"{denied} denied: {forgotten} are left over",
        )
        raised = ledger.sent_of({Kind.RAISE, Kind.BAD_POINTER}) + ledger.starts[Kind.SLOW_FAIL]
        expected = Counter({"failed on method": raised, "was not written": ledger.sent[Kind.LOST]})
        expected["16-bit"] = min(1, ledger.sent[Kind.REAL_MODE])
        check(log.counts == expected, f"in the log are {log.counts}, expected {expected}")
        check(summary.guest is not None, "the guest has no end")
        if self._traps >= FEWEST_FOR_FLAT:
            first, second = self._halves()
            check(
                abs(second - first) <= FLAT * first,
                f"memory is not flat: {first:.1f} MiB, then {second:.1f} MiB",
            )

    def _halves(self) -> tuple[float, float]:
        samples, half = self._samples, len(self._samples) // 2
        if not half:
            return resident(), resident()
        return statistics.median(samples[:half]), statistics.median(samples[half:])

    def _report(self, summary, seconds: float) -> Report:
        ledger = self.ledger
        kinds: dict[str, dict[str, int]] = {}
        for kind in Kind:
            if ledger.sent[kind]:
                kinds[kind.name.lower()] = {"sent": ledger.sent[kind]} | {
                    outcome.value: ledger.outcomes[kind, outcome]
                    for outcome in OutcomeKind
                    if ledger.outcomes[kind, outcome]
                }
        outcomes = {kind.value: count for kind, count in summary.outcomes.items()}
        return Report(
            self._loop,
            self._seed,
            self._lanes,
            ledger.all_sent,
            summary.retries,
            seconds,
            ledger.all_sent / seconds,
            outcomes | {"native": summary.native},
            kinds,
            {kind.name.lower(): count for kind, count in sorted(ledger.planned.items())},
            summary.uncollected + summary.abandoned,
            ledger.longest_hang,
            self._most_tasks,
            *self._halves(),
            ledger.wrongs,
            ledger.first_wrongs,
        )
