"""The life of a trap: whatever happens, and in whatever order, it is answered once.

A state machine plays all who have a part in it: the guest that traps and asks again, the
handlers, the backend and its memory, the consumer of the outcomes, and the clock. After
each step the loop runs until nothing is left to do. Then the rules are checked that hold
at any time; at the end, those that hold for a whole run.

- Time is made up. It stands still but for the steps that let it pass, so that a deadline
  is met to the second, and nothing here waits for a real one.
- A handler does what it is told, when it is told: it answers, fails, reads memory, or
  takes its time when it is cancelled.
- What the machine knows of a request, it has from what can be seen: a trap is taken, a
  handler begins or ends, a reply is written. `Requests` says what must follow from it.
- Each request of the engine is watched: its state changes as the table of `engine.request` says.
- Several things may happen at once. Where two of them race, either may win: the keys that
  this touches are *unsure* from there on, and only what holds for all traps is checked.
"""

import asyncio
import logging
import math
import selectors
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from functools import partial
from itertools import chain
from threading import Thread
from typing import Any, ClassVar, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from anyio.from_thread import BlockingPortal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transitions import EDGES, WatchedStates, watched_states

import vmibridge.engine.workers
from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.engine.policy import Policy
from vmibridge.engine.request import State
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink

# --- time that stands still ---------------------------------------------------------


class StillSelector(selectors.DefaultSelector):
    """Never waits for time; tells when the loop has nothing left to do."""

    quiet: asyncio.Future[None] | None = None

    def select(self, timeout=None):
        found = super().select(0)
        if found or timeout == 0:
            return found
        if self.quiet is not None:
            self.quiet.set_result(None)
            self.quiet = None
            return []
        return super().select(None)


class StillLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time is made up."""

    def __init__(self):
        self.now = 0.0
        self.selector = StillSelector()
        super().__init__(self.selector)

    def time(self):
        return self.now


class Asyncio:
    """asyncio, as the machine needs it."""

    name = "asyncio"

    @staticmethod
    def options() -> dict[str, Any]:
        return {"loop_factory": StillLoop}

    @staticmethod
    async def quiet() -> None:
        """Let every task run for as long as it can."""
        loop = asyncio.get_running_loop()
        loop.selector.quiet = loop.create_future()
        await loop.selector.quiet

    @staticmethod
    def advance(seconds: float) -> None:
        asyncio.get_running_loop().now += seconds


class Trio:
    """The same for trio."""

    name = "trio"

    @staticmethod
    def options() -> dict[str, Any]:
        return {"clock": trio.testing.MockClock()}

    @staticmethod
    async def quiet() -> None:
        await trio.testing.wait_all_tasks_blocked()

    @staticmethod
    def advance(seconds: float) -> None:
        trio.lowlevel.current_clock().jump(seconds)


class LoopThread:
    """A loop in a thread of its own, and a way into it. One that hangs is left behind."""

    def __init__(self, loop: type[Asyncio] | type[Trio]):
        self._loop = loop
        self._portal: Future[BlockingPortal] = Future()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(BaseException):
            anyio.run(self._main, backend=self._loop.name, backend_options=self._loop.options())

    async def _main(self) -> None:
        async with BlockingPortal() as portal:
            self._portal.set_result(portal)
            await portal.sleep_until_stopped()

    def start(self, function, *args) -> Future[Any]:
        """Start a task in the loop."""
        return self._portal.result().start_task_soon(function, *args)

    def close(self) -> None:
        """End it; what is left there is cancelled."""
        with suppress(RuntimeError):
            self.start(self._portal.result().stop, True)
        self._thread.join(5)


# --- what a guest may ask, and on what terms ----------------------------------------

MAGIC = 0x1234_5678
STAMP = 0x5747
WAIT, FALLBACK, LATE, RESULT = 0x1, 0xBAD, 0x1A7E, 0x1000
"""value1 of a reply; a result adds the number of the run that it comes from."""

VCPUS = 3
QUEUE = 4
IN_FLIGHT = 2
OUTCOMES_AHEAD = 2
TIMEOUT, SOFT_TIMEOUT, RESULT_TIMEOUT = 4.0, 1.0, 3.0
GRACE, STOP_TIMEOUT = 2.0, 6.0


class Terms(NamedTuple):
    soft: float
    hard: float


PATIENT, SOFT, BOTH, STRICT = 1, 2, 3, 4
TERMS = {
    PATIENT: Terms(math.inf, 8.0),
    SOFT: Terms(SOFT_TIMEOUT, TIMEOUT),
    BOTH: Terms(2.0, 2.0),
    STRICT: Terms(3.0, 2.0),
}
LONGEST = max(terms.hard for terms in TERMS.values())

FREE, SERIAL, PASSED, NOBODY = 1, 2, 3, 9
"""Requests: with a handler, a serial one, one behind a dispatcher that passes; without."""


class Order(Enum):
    """What a handler is told to do."""

    ANSWER = 1
    REJECT = 2
    RAISE = 3
    CANCEL_ITSELF = 4
    CANCEL_ITS_TASK = 5
    STEP = 6
    READ = 7
    READ_SLOWLY = 8
    READ_STUBBORNLY = 9
    READ_ACROSS = 10
    WRITE = 11
    WRITE_SLOWLY = 12
    EXIT = 13
    CANCEL_ITS_TASK_LATE = 14


class Manner(Enum):
    """How a handler takes it when it is cancelled."""

    GO = 1
    LINGER = 2
    ANSWER = 3
    RAISE = 4
    READ = 5


class Ask(NamedTuple):
    """A request as a guest tells it from others: what a retry has in common with it."""

    space: int
    request: int
    method: int
    what: int
    """value1."""
    first: int
    """value2: the order that the handler begins with; 0 is none."""
    detour: int
    """value3: whether the dispatcher before it waits, where there is one."""

    @property
    def terms(self) -> Terms:
        return TERMS[self.method]


class Kind(Enum):
    """Whose a trap is."""

    OURS = "ours"
    NATIVE = "native"
    UNMATCHED = "unmatched"
    DENIED = "denied"
    REAL_MODE = "real mode"


class Trap:
    """One trap, and what has become of it."""

    def __init__(self, seq: int, vcpu: int, kind: Kind, ask: Ask):
        self.seq = seq
        self.vcpu = vcpu
        self.kind = kind
        self.ask = ask
        self.event = _event(seq, vcpu, kind, ask)
        self.put = False
        """The server has it."""
        self.taken: float | None = None
        """When it was taken out of its lane."""
        self.fate: Fate | None = None
        self.request: Request | None = None
        """The request that began with it."""
        self.left = False
        """Its soft deadline has passed: its request goes on without it."""
        self.reply: Reply | None = None
        self.run: Run | None = None
        """The run whose result it got."""
        self.written: bool | None = None
        """`None`: the write is under way, or was cut short. `False`: it failed."""
        self.writes: RegisterWrites | None = None

    @property
    def open(self) -> bool:
        return self.put and self.reply is None

    def __repr__(self):
        return f"<trap {self.seq} of vCPU {self.vcpu}, {self.kind.value}: {self.reply}>"


def _event(seq: int, vcpu: int, kind: Kind, ask: Ask) -> TrapEvent:
    magic = 0xBEEF if kind is Kind.NATIVE else MAGIC
    request = NOBODY if kind is Kind.UNMATCHED else ask.request
    selector = request | ask.method << 16
    if kind is Kind.REAL_MODE:
        registers = Registers(rax=magic, rcx=selector)
        return TrapEvent(
            seq, TrapReason.CPUID, registers, "fake", vcpu, ip=0x100, length=2, width=16
        )
    registers = Registers(
        rcx=magic,
        rdx=selector,
        r8=ask.what,
        r9=ask.first,
        r10=ask.detour,
        r11=seq,
        cr3=ask.space,
    )
    ring = 3 if kind is Kind.DENIED else 0
    return TrapEvent(
        seq, TrapReason.VMCALL, registers, "fake", vcpu, ip=0x1000, length=3, ring=ring
    )


class Reply(Enum):
    """What a guest sees."""

    NATIVE = "its instruction runs natively"
    MOVED_ON = "its registers as they were"
    WAIT = "wait"
    FALLBACK = "the fallback"
    RESULT = "a result"


class Fate(Enum):
    """What a trap is to the server when it is taken."""

    NEW = "the first of its request"
    RETRY = "a retry: it gets the result, now or later"
    TOO_MANY = "one more retry than there are requests: it is told to wait"


class Run:
    """One run of a handler."""

    def __init__(self, number: int, ask: Ask, request: "Request", manner: Manner):
        self.number = number
        self.ask = ask
        self.request = request
        self.orders: deque[Order] = deque([Order(ask.first)] if ask.first else [])
        self.ordered = anyio.Event()
        self.manner = manner
        self.let_go = anyio.Event()
        self.unwinding = False
        self.ended = False
        self.in_memory = False
        """It waits for an access to guest memory."""
        self.answered = False
        """It ended by itself, with an answer."""
        self.delivered: Trap | None = None

    def tell(self, order: Order) -> None:
        self.orders.append(order)
        self.ordered.set()

    async def next_order(self) -> Order:
        while not self.orders:
            self.ordered = anyio.Event()
            await self.ordered.wait()
        return self.orders.popleft()


# --- the rules ----------------------------------------------------------------------


class Request:
    """What a guest asked for once, however often it asks again."""

    def __init__(self, ask: Ask, first: float):
        self.ask = ask
        self.first = first
        """When its first trap was taken: its hard deadline counts from there."""
        self.run: Run | None = None
        self.kept: float | None = None
        """Since when its result waits for a retry."""
        self.good = False
        """Whether that is an answer."""

    def late(self, now: float) -> bool:
        """Past its hard deadline."""
        return now >= self.first + self.ask.terms.hard

    def overdue(self, now: float) -> bool:
        """Past its hard deadline without a result."""
        return self.kept is None and self.late(now)

    def fruitless(self, now: float) -> bool:
        """Whether it may give the fallback."""
        if self.kept is not None:
            return not self.good
        if self.run is not None and self.run.ended and not self.run.answered:
            return True
        return self.late(now)


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


# --- those who have a part in it ----------------------------------------------------

AT_ONCE, SLOW, STUBBORN = 0x1000, 0x2000, 0x5000
"""Physical memory that answers at once; after a while; after a while, cancelled or not."""
_PAGE = 0x1000


RUN: ContextVar[Run] = ContextVar("RUN")
"""The run that makes an access."""


class Access:
    """An access to slow memory that is under way."""

    def __init__(self, trap: Trap, run: Run, stubborn: bool):
        self.trap = trap
        self.run = run
        self.stubborn = stubborn
        self.done = anyio.Event()


class Vm(Backend):
    """A VM whose vCPUs do what the machine says."""

    def __init__(self, requests: Requests):
        super().__init__("fake")
        self.requests = requests
        self.sink: TrapSink | None = None
        self.started = anyio.Event()
        self.held: deque[Trap] = deque()
        self.arrived = anyio.Event()
        self.over = anyio.Event()
        self.failure: Exception | None = None
        self.failed = False
        self.lost = False
        self.slow_vcpus: set[int] = set()
        self.writing: dict[int, anyio.Event] = {}
        self.accesses: list[Access] = []

    async def run(self, traps, sink):
        self.sink = sink
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._feed)
                self.started.set()
                await self.over.wait()
                tasks.cancel_scope.cancel()
        finally:
            self.requests.guest_gone = True
        if self.failure is not None:
            self.failed = True
            raise self.failure
        return GuestEnd()

    def stop(self):
        if any(trap.open for trap in self.requests.traps.values()):
            self.requests.fault("the guest is let go while a trap of it is open")
        self.over.set()

    def trap(self, trap: Trap) -> None:
        """One vCPU traps. A vCPU here may trap again before it has its answer."""
        if self.over.is_set() or self.sink is None:
            return
        if any(held.vcpu == trap.vcpu for held in self.held):
            self._hold(trap)
            return
        try:
            self.sink.put_nowait(trap.event)
        except anyio.WouldBlock:
            self._hold(trap)
        except TrapQueueClosedError:
            pass
        else:
            trap.put = True

    def _hold(self, trap: Trap) -> None:
        self.held.append(trap)
        self.arrived.set()

    async def _feed(self) -> None:
        assert self.sink is not None
        while True:
            while self.held:
                with suppress(TrapQueueClosedError):
                    await self.sink.put(self.held[0].event)
                    self.held[0].put = True
                self.held.popleft()
            self.arrived = anyio.Event()
            await self.arrived.wait()

    async def resume(self, event, writes):
        trap = self.requests.traps[event.seq]
        trap.writes = writes
        self.requests.replied(trap, *self._reply(trap, writes))
        if trap.vcpu in self.slow_vcpus:
            self.slow_vcpus.discard(trap.vcpu)
            self.writing[trap.seq] = anyio.Event()
            try:
                await self.writing[trap.seq].wait()
            except anyio.get_cancelled_exc_class():
                if self.requests.now() < self.requests.stopped_at + STOP_TIMEOUT:
                    self.requests.fault(f"the write of the answer to {trap} was cut short")
                raise
            finally:
                del self.writing[trap.seq]
        trap.written = not self.lost
        if self.lost:
            raise BackendError("the VM is gone")

    def _reply(self, trap: Trap, writes: RegisterWrites | None) -> tuple[Reply, Run | None]:
        if writes is None:
            return Reply.NATIVE, None
        if writes.rip != trap.event.ip + trap.event.length:
            self.requests.fault(f"{trap} goes on at {writes.rip:#x}")
        value = writes.rax
        if value is None:
            return Reply.MOVED_ON, None
        if value in (WAIT, FALLBACK):
            if writes.rdx != (STAMP if value == WAIT and trap.ask.request != PASSED else None):
                pass
            return (Reply.WAIT if value == WAIT else Reply.FALLBACK), None
        if value < RESULT or writes.rdx != STAMP:
            self.requests.fault(f"{trap} got {writes}")
            return Reply.FALLBACK, None
        return Reply.RESULT, self.requests.runs[value - RESULT]

    async def read_physical(self, event, address, size):
        await self._access(event, address)
        # It tells which trap it was read in.
        return bytes([1 + event.seq % 0xFF]) * size

    async def write_physical(self, event, address, data):
        await self._access(event, address)

    async def _access(self, event: TrapEvent, address: int) -> None:
        trap = self.requests.traps[event.seq]
        if not trap.open:
            self.requests.fault(f"an access to memory began in {trap}, and its vCPU runs")
        if address < SLOW:
            return
        access = Access(trap, RUN.get(), address >= STUBBORN)
        self.accesses.append(access)
        with anyio.CancelScope(shield=access.stubborn):
            try:
                await access.done.wait()
            finally:
                if access in self.accesses:
                    self.accesses.remove(access)

    def finish(self, access: Access) -> None:
        """This is the moment when memory is read or written."""
        trap, requests = access.trap, self.requests
        self.accesses.remove(access)
        access.done.set()
        # A hard deadline does not wait for an access that nobody can cancel.
        late = access.run.request.late(requests.now())
        cut_off = access.stubborn and (requests.ending or late)
        if not trap.open and not cut_off:
            requests.fault(f"memory was accessed in {trap}, and its vCPU runs")


class Watched(Bridge):
    """A bridge that tells when a trap is taken."""

    requests: Requests

    def match(self, packet, reason):
        trap = self.requests.traps.get(packet.value4)
        if trap is not None:
            self.requests.taken(trap)
        return super().match(packet, reason)


class Free(BridgeHandler[int]):
    """Does what it is told."""

    MAGIC = MAGIC
    REQUEST = FREE
    VERIFY_VALUE4 = STAMP

    def __init__(self, requests: Requests):
        self.requests = requests

    @method(PATIENT, soft_timeout=TERMS[PATIENT].soft, timeout=TERMS[PATIENT].hard)
    async def patient(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(SOFT, may_wait=True)
    async def soft(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(BOTH, soft_timeout=TERMS[BOTH].soft, timeout=TERMS[BOTH].hard)
    async def both(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(STRICT, soft_timeout=TERMS[STRICT].soft, timeout=TERMS[STRICT].hard)
    async def strict(self, vmi, packet):
        return await self._serve(vmi, packet)

    async def _serve(self, vmi, packet):
        run = self.requests.passed.pop(vmi, None)
        run = run or self.requests.begins(self.requests.traps[packet.value4])
        try:
            return await self._obey(vmi, run)
        except anyio.get_cancelled_exc_class():
            if run.unwinding:
                raise
            run.unwinding = True
            return await self._unwind(vmi, run)
        finally:
            run.ended = True

    async def _obey(self, vmi, run):
        while True:
            if not run.orders:
                self.requests.waits()
            match await run.next_order():
                case Order.ANSWER:
                    run.answered = True
                    return BridgeResponse(RESULT + run.number).with_output(run.number)
                case Order.REJECT:
                    return None
                case Order.RAISE:
                    raise LookupError("on purpose")
                case Order.EXIT:
                    raise SystemExit(3)
                case Order.CANCEL_ITSELF:
                    return await self._cancel_itself(run)
                case Order.CANCEL_ITS_TASK:
                    return await self._cancel_its_task(run)
                case Order.CANCEL_ITS_TASK_LATE:
                    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
                        asyncio.current_task().cancel()
                    return None
                case Order.STEP:
                    await anyio.lowlevel.checkpoint()
                case order:
                    await self._access(vmi, run, order)

    async def _access(self, vmi, run, order):
        self.requests.waits()
        memory = vmi.memory
        run.in_memory = True
        RUN.set(run)
        try:
            match order:
                case Order.READ:
                    await memory.read_physical(AT_ONCE, 4)
                case Order.READ_SLOWLY:
                    await memory.read(SLOW, 4)
                case Order.READ_STUBBORNLY:
                    await memory.read_physical(STUBBORN, 4)
                case Order.READ_ACROSS:
                    text = await memory.read_string(SLOW + _PAGE - 4, 8, encoding="latin-1")
                    if len(text) != 8 or len(set(text)) != 1:
                        self.requests.fault(f"read in two traps at once: {text!r}")
                case Order.WRITE:
                    await memory.write(AT_ONCE, b"1234")
                case Order.WRITE_SLOWLY:
                    await memory.write_physical(SLOW, b"1234")
        except GuestMemoryError:
            if not (self.requests.ending or run.request.late(self.requests.now())):
                self.requests.fault(f"a handler was cut off from memory too early: {run.ask}")
            raise
        finally:
            run.in_memory = False

    async def _cancel_itself(self, run):
        # As when something that it awaits was cancelled by others.
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            run.unwinding = True
            raise asyncio.CancelledError
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    async def _cancel_its_task(self, run):
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            run.unwinding = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await anyio.lowlevel.checkpoint()

    async def _unwind(self, vmi, run):
        match run.manner:
            case Manner.LINGER:
                with anyio.CancelScope(shield=True):
                    await run.let_go.wait()
            case Manner.ANSWER:
                return BridgeResponse(LATE)
            case Manner.RAISE:
                raise LookupError("on the way out")
            case Manner.READ:
                with anyio.CancelScope(shield=True), suppress(GuestMemoryError):
                    await vmi.memory.read_physical(AT_ONCE, 1)
                    self.requests.fault(f"memory was read after the final answer: {run.ask}")
        raise  # noqa: PLE0704 - called where the cancellation was caught


class Serial(Free):
    """The same, one at a time."""

    REQUEST = SERIAL
    serial = True


class Behind(Free):
    """The same, behind a dispatcher."""

    REQUEST = PASSED


class Passes(BridgeDispatch):
    """Asked first; passes every request on, at once or when it is told something."""

    may_wait = True

    def __init__(self, requests: Requests):
        self.requests = requests

    def contracts(self):
        return [BridgeContract(PASSED, MAGIC)]

    async def dispatch(self, vmi, packet):
        if packet.value3:
            run = self.requests.begins(self.requests.traps[packet.value4])
            try:
                if not run.orders:
                    self.requests.waits()
                await run.next_order()
            except BaseException:
                run.unwinding = run.ended = True
                raise
            self.requests.passed[vmi] = run
        return Outcome(OutcomeKind.UNMATCHED, packet)


# --- all of it together -------------------------------------------------------------


class End(Enum):
    """How a run comes to its end."""

    STOP = "the server is stopped"
    STOP_NOW = "the server is stopped, without grace"
    BREAK = "the consumer leaves its loop at the next outcome"
    WALK_AWAY = "the consumer leaves its loop and the block"
    CLOSE = "the consumer closes the run"
    CANCEL = "the consumer's task is cancelled"
    GUEST_ENDS = "the guest ends"
    GUEST_LOST = "the backend loses the guest, and says so"
    WRITES_FAIL = "the backend loses the guest, and no reply can be written any more"


class Stage:
    """One run of a server, for the machine to play on."""

    def __init__(self, manners: list[Manner]):
        self.requests = Requests(manners)
        self.requests.now = anyio.current_time
        self.requests.accessing = lambda ask: any(
            access.trap.ask == ask for access in self.vm.accesses
        )
        self.vm = Vm(self.requests)
        bridge = Watched(*(kind(self.requests) for kind in (Free, Serial, Passes, Behind)))
        bridge.requests = self.requests
        self.server = BridgeServer(
            self.vm,
            bridge,
            timeout=TIMEOUT,
            soft_timeout=SOFT_TIMEOUT,
            wait=BridgeResponse(WAIT),
            retry_values=(1, 2, 3),
            result_timeout=RESULT_TIMEOUT,
            fallback=BridgeResponse(FALLBACK),
            queue=QUEUE,
            in_flight=IN_FLIGHT,
            in_flight_total=IN_FLIGHT,
            grace=GRACE,
            stop_timeout=STOP_TIMEOUT,
            policy=Policy(rings=frozenset({0})),
        )
        self.outcomes: list[Outcome[Any]] = []
        self.read_on = anyio.Event()
        self.read_on.set()
        self.how: End | None = None
        self.block = anyio.CancelScope()
        self.consumer = anyio.CancelScope()
        self.leave = anyio.Event()
        self.out_of_the_loop = self.read_to_the_end = self.done = False
        self.error: BaseException | None = None

    async def play(self) -> None:
        """The consumer."""
        try:
            with self.block:
                async with self.vm:
                    await self._consume()
                    if self.how is not End.WALK_AWAY:
                        await self.leave.wait()
        except (BackendError, SystemExit) as error:
            self.error = error
            self.read_to_the_end = self.how is not End.WALK_AWAY
        finally:
            self.done = True

    async def _consume(self) -> None:
        run = self.server.run()
        with self.consumer:
            async for outcome in run:
                self.outcomes.append(outcome)
                if self.how is End.BREAK:
                    break
                await self.read_on.wait()
            else:
                self.read_to_the_end = True
        self.out_of_the_loop = True
        if self.how is End.CLOSE:
            await run.aclose()

    @property
    def told(self) -> list[Trap]:
        """Traps that were told to wait."""
        return [trap for trap in self.requests.traps.values() if trap.reply is Reply.WAIT]

    @property
    def held(self) -> list[Callable[[], None]]:
        """What takes its time: call one to end it."""
        return [
            *[written.set for written in self.vm.writing.values()],
            *[partial(self.vm.finish, access) for access in self.vm.accesses],
            *[run.let_go.set for run in self.requests.alive if run.unwinding],
        ]

    # What may happen.

    def trap(self, vcpu: int, kind: Kind, ask: Ask) -> None:
        traps = self.requests.traps
        trap = traps[len(traps) + 1] = Trap(len(traps) + 1, vcpu, kind, ask)
        self.vm.trap(trap)

    def read(self, on: bool) -> None:
        self.requests.reading = on
        if on:
            self.read_on.set()
        elif self.read_on.is_set():
            self.read_on = anyio.Event()

    def end(self, how: End) -> None:
        """Begin the end."""
        if how is End.WRITES_FAIL:
            # The traps that are there are the server's all the same.
            self.vm.lost = True
            return
        self.requests.ending = True
        guest = how in (End.GUEST_ENDS, End.GUEST_LOST)
        if not guest:
            self.requests.stopped_at = min(self.requests.stopped_at, self.requests.now())
        if how in (End.STOP, End.STOP_NOW):
            self.server.stop(now=how is End.STOP_NOW)
        elif guest:
            if not self.vm.over.is_set() and how is End.GUEST_LOST:
                self.vm.failure = BackendError("lost the guest")
            self.vm.over.set()
        elif how is End.CANCEL:
            self.block.cancel()
        elif self.how is None:
            self.how = how
            if how is not End.BREAK:
                self.consumer.cancel()
            else:
                self.read(True)

    def unanswered(self) -> list[Trap]:
        """Traps that have no reply, but for those behind a write that hangs."""
        traps = self.requests.traps.values()
        held = {trap.vcpu for trap in traps if trap.reply is not None and trap.written is None}
        return [trap for trap in traps if trap.open and trap.vcpu not in held]

    def finish_writes(self) -> None:
        for written in self.vm.writing.values():
            written.set()
        self.vm.slow_vcpus.clear()

    def release(self) -> None:
        """Let everything go that is held."""
        self.vm.slow_vcpus.clear()
        for end in self.held:
            end()
        self.read(True)

    def check(self) -> None:
        """What holds whenever the loop has nothing left to do."""
        self.requests.check()
        if not (self.requests.ending or self.requests.unsure):
            summary = self.server.summary
            assert summary.uncollected == self.requests.uncollected
            assert summary.abandoned == 0

    def check_whole(self) -> None:
        """What holds for a run from its start to its end."""
        requests, summary = self.requests, self.server.summary
        put = [trap for trap in requests.traps.values() if trap.put]
        assert self.unanswered() == []
        assert [run.ask for run in requests.alive] == []
        native = [trap for trap in put if trap.kind is Kind.NATIVE and trap.reply is not None]
        told = {t.seq for t in put if t.kind is not Kind.NATIVE and t.written is not None}
        assert summary.native == len(native)
        assert summary.total == len(told)
        seen = Counter(outcome.event.seq for outcome in self.outcomes)
        assert max(seen.values(), default=1) == 1
        assert set(seen) <= told
        if self.read_to_the_end:
            assert set(seen) == told
            assert self.error is not None or not self.vm.failed
        for outcome in self.outcomes:
            self.check_outcome(outcome)
        if not requests.unsure:
            retries = [t for t in put if t.fate in (Fate.RETRY, Fate.TOO_MANY)]
            assert summary.retries == len(retries)
            dropped = requests.told - requests.collected
            assert summary.uncollected + summary.abandoned == dropped

    def check_outcome(self, outcome: Outcome[Any]) -> None:
        """An outcome tells what the guest was told."""
        trap = self.requests.traps[outcome.event.seq]
        if not trap.written:
            assert outcome.kind is OutcomeKind.FAILED
            assert outcome.writes is None
            return
        assert outcome.writes == trap.writes
        told = {
            Reply.NATIVE: {OutcomeKind.DENIED},
            Reply.MOVED_ON: {OutcomeKind.UNMATCHED, OutcomeKind.FAILED, OutcomeKind.CANCELLED},
            Reply.WAIT: {OutcomeKind.WAITING},
            Reply.RESULT: {OutcomeKind.HANDLED},
            Reply.FALLBACK: {
                OutcomeKind.REJECTED,
                OutcomeKind.FAILED,
                OutcomeKind.TIMEOUT,
                OutcomeKind.CANCELLED,
            },
        }[trap.reply]
        assert outcome.kind in told
        if outcome.kind is OutcomeKind.HANDLED:
            assert outcome.output == outcome.writes.rax - RESULT
        if trap.kind is Kind.OURS:
            assert outcome.packet.value4 == trap.seq


# --- the moves ----------------------------------------------------------------------


class Traps(NamedTuple):
    """A vCPU traps. It asks, asks again what was told to wait, or is none of ours."""

    vcpu: int
    what: str | Kind
    which: int

    def make(self, life: "TrapLife") -> None:
        told = life.stage.told
        if self.what == "again" and told:
            last = told[-1 - self.which % len(told)]
            life.stage.trap(last.vcpu, Kind.OURS, last.ask)
        else:
            kind = self.what if isinstance(self.what, Kind) else Kind.OURS
            life.stage.trap(self.vcpu, kind, life.asks[self.which % len(life.asks)])


class Tell(NamedTuple):
    """A handler gets an order."""

    which: int
    order: Order

    def make(self, life: "TrapLife") -> None:
        alive = life.stage.requests.alive
        if alive:
            alive[self.which % len(alive)].tell(self.order)


class SlowWrite(NamedTuple):
    """The next write to a vCPU takes its time."""

    vcpu: int

    def make(self, life: "TrapLife") -> None:
        life.stage.vm.slow_vcpus.add(self.vcpu)


class Lag(NamedTuple):
    """The consumer stops reading for some steps."""

    steps: int

    def make(self, life: "TrapLife") -> None:
        life.lag = self.steps
        life.stage.read(False)


class Done(NamedTuple):
    """Something that takes its time is done."""

    which: int

    def make(self, life: "TrapLife") -> None:
        held = life.stage.held
        if held:
            held[self.which % len(held)]()


class Time(NamedTuple):
    """Time passes."""

    seconds: float

    def make(self, life: "TrapLife") -> None:
        life.loop.advance(self.seconds)


class Ends(NamedTuple):
    """The end begins."""

    how: End

    def make(self, life: "TrapLife") -> None:
        if life.may_end:
            life.stage.end(self.how)


FIELDS = {
    "space": st.sampled_from([0x1000, 0x2000]),
    "request": st.sampled_from([FREE, FREE, SERIAL, PASSED]),
    "method": st.sampled_from([SOFT, SOFT, SOFT, PATIENT, BOTH, STRICT]),
    "what": st.integers(0, 1),
    "first": st.sampled_from([0] * len(Order) + [o.value for o in Order]),
    "detour": st.integers(0, 1),
}


def possible(ask: Ask) -> Ask:
    """The dispatcher has the terms of the server; only it makes a detour."""
    return ask._replace(**{"method": SOFT} if ask.request == PASSED else {"detour": 0})


@st.composite
def repertoires(draw) -> list[Ask]:
    """What a guest may ask: a few requests that have much in common."""
    ask = draw(st.builds(Ask, **FIELDS))
    asks = [possible(ask)]
    for field in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=3)):
        asks.append(possible(ask._replace(**{field: draw(FIELDS[field])})))
    return asks


VCPU = st.integers(0, VCPUS - 1)
WHICH = st.integers(0, 5)
WHAT = st.sampled_from(["ask"] * 6 + ["again"] * 6 + list(Kind))
ORDERS = st.sampled_from([Order.ANSWER] * len(Order) + list(Order))
SECONDS = st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0])
MOVES = st.sampled_from(
    [
        *[st.builds(Traps, VCPU, WHAT, WHICH)] * 6,
        *[st.builds(Tell, WHICH, ORDERS)] * 4,
        *[st.builds(Time, SECONDS)] * 3,
        *[st.builds(Done, WHICH)] * 3,
        st.builds(SlowWrite, VCPU),
        st.builds(Lag, st.integers(1, 6)),
        st.builds(Ends, st.sampled_from(End)),
    ]
).flatmap(lambda move: move)


# --- the machine --------------------------------------------------------------------


class TrapLife(RuleBasedStateMachine):
    """Makes the moves, one or several at a time; the loop runs in between."""

    loop: ClassVar[type[Asyncio] | type[Trio]]
    states: ClassVar[WatchedStates]
    stage: Stage

    def __init__(self):
        super().__init__()
        self.thread: LoopThread | None = None
        self.steps = self.lag = 0
        self.playing = False

    @initialize(
        seed=st.integers(0, 0xFFFF),
        asks=repertoires(),
        manners=st.lists(st.sampled_from(Manner), min_size=1, max_size=4),
        idle=st.sampled_from([1, 1024]),
        life=st.sampled_from([0, 10, 20, 30]),
        racing=st.booleans(),
        finale=st.sampled_from([end for end in End if end is not End.WRITES_FAIL]),
    )
    def begins(self, seed, asks, manners, idle, life, racing, finale):
        """`idle` is the number of idle workers that are kept, `life` that of the steps before
        anything comes to its end."""
        vmibridge.engine.workers._MAX_IDLE = idle
        self.states.wrong.clear()
        self.seed, self.asks, self.life, self.finale = seed, asks, life, finale
        self.racing = racing
        self.thread = LoopThread(self.loop)
        self.call(self._set_up, manners)
        self.thread.start(self.stage.play)
        self.playing = True
        self.step()

    async def _set_up(self, manners):
        self.tasks = len(anyio.get_running_tasks())
        self.stage = Stage(manners)

    @rule(move=MOVES)
    def something_happens(self, move):
        self.step(partial(move.make, self))

    @precondition(lambda self: self.racing)
    @rule(moves=st.lists(MOVES, min_size=2, max_size=4))
    def much_happens_at_once(self, moves):
        self.step(*[partial(move.make, self) for move in moves])

    @property
    def may_end(self) -> bool:
        return self.steps > self.life

    # Steps.

    def call(self, function, *args):
        return self.thread.start(function, *args).result(20)

    def step(self, *moves: Callable[[], object]) -> None:
        self.call(self._make, moves)

    async def _make(self, moves):
        trio._core._run._r.seed(self.seed + self.steps)
        self.steps += 1
        self.lag -= 1
        for move in moves:
            move()
        if self.lag == 0:
            self.stage.read(True)
        await self.loop.quiet()
        self.stage.check()
        assert self.states.wrong == []

    # The end of the play.

    def teardown(self):
        if self.thread is None:
            return
        try:
            if self.playing and not self.stage.requests.faults:
                self._end(self.stage)
        finally:
            if self.playing and not self.stage.done:
                with suppress(Exception):
                    self.thread.start(self._give_up).result(5)
            self.thread.close()

    def _end(self, stage):
        self.step(lambda: stage.end(self.finale))
        if stage.requests.stopped_at == math.inf:
            # The guest has ended: the deadlines of the handlers do the rest.
            self.step(lambda: stage.read(True))
            for _ in range(100):
                if not stage.unanswered():
                    break
                self.step(stage.finish_writes)
                self.step(lambda: self.loop.advance(2.0))
        else:
            if stage.how is End.BREAK and not stage.out_of_the_loop:
                self.step(lambda: stage.end(End.CANCEL))
            for _ in range(int(STOP_TIMEOUT) + 1):
                self.step(lambda: self.loop.advance(1.0))
        assert stage.unanswered() == []
        self.step(stage.leave.set)
        for _ in range(50):
            if stage.done:
                break
            self.step(stage.release)
            self.step(lambda: self.loop.advance(LONGEST))
        assert stage.done, "the server does not end"
        self.call(self._check_whole)

    async def _check_whole(self):
        self.stage.check_whole()
        assert len(anyio.get_running_tasks()) == self.tasks

    async def _give_up(self):
        self.stage.leave.set()
        self.stage.block.cancel()
        for _ in range(20):
            self.stage.release()
            self.loop.advance(4.0)
            await self.loop.quiet()


class TrapLifeOnAsyncio(TrapLife):
    loop = Asyncio


class TrapLifeOnTrio(TrapLife):
    loop = Trio


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """The engine's clock is the loop's, and trio's order of tasks can be had again."""
    monkeypatch.setattr("vmibridge.engine.workers._clock", anyio.current_time)
    monkeypatch.setattr("vmibridge.engine.deadlines._clock", anyio.current_time)
    monkeypatch.setattr("vmibridge.engine.workers._MAX_IDLE", 1)
    monkeypatch.setattr("vmibridge.engine.server.OUTCOMES_AHEAD", OUTCOMES_AHEAD)
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def play(machine, examples: int, steps: int) -> WatchedStates:
    with watched_states() as machine.states:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    machine.states.check()
    return machine.states


SELDOM = {
    (State.INLINE, State.ENTERING),
    (State.ENTERING, State.ANSWERED),
    (State.QUEUED, State.ANSWERED),
}
"""Transitions that the moves do not lead to; `test_request_states` has those that there are."""

MACHINES = [
    pytest.param(TrapLifeOnAsyncio, id="asyncio"),
    pytest.param(TrapLifeOnTrio, id="trio"),
]


@pytest.mark.no_cover
@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens(machine):
    play(machine, examples=100, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens_for_long(machine):
    states = play(machine, examples=1500, steps=60)
    assert EDGES - set(states.seen) <= SELDOM
