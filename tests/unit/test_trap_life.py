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
- Several things may happen at once. Where two of them race, either may win: the keys that
  this touches are *unsure* from there on, and only what holds for all traps is checked.
"""

import asyncio
import logging
import math
import selectors
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vmibridge import (
    Bridge,
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
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.policy import Policy
from vmibridge.vmi import Backend, GuestEnd, TrapSink

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


# --- what a guest may ask, and on what terms ----------------------------------------

MAGIC = 0x1234_5678
STAMP = 0x5747
WAIT, FALLBACK, LATE, RESULT = 0x1, 0xBAD, 0x1A7E, 0x1000
"""value1 of a reply; a result adds the number of the run that it comes from."""

VCPUS = 3
QUEUE = 4
IN_FLIGHT = 3
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

    def overdue(self, now: float) -> bool:
        """Past its hard deadline without a result."""
        return self.kept is None and now >= self.first + self.ask.terms.hard

    def fruitless(self, now: float) -> bool:
        """Whether all that it can still give is the fallback."""
        if self.run is not None and self.run.ended:
            return not self.run.answered
        return now >= self.first + self.ask.terms.hard


class Requests:
    """The rules for traps and requests, followed by what is seen of them."""

    def __init__(self, manners: list[Manner]):
        self.manners = manners
        self.now: Callable[[], float] = lambda: 0.0
        self.faults: list[str] = []
        self.traps: dict[int, Trap] = {}
        self.runs: list[Run] = []
        self.pending: dict[Ask, list[Request]] = defaultdict(list)
        """Those that were told to wait after their handler had begun."""
        self.unsure: set[Ask] = set()
        self.told = self.collected = self.uncollected = 0
        self.ending = False
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
        return [run for run in self.runs if not run.ended]

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
        if trap.fate is Fate.NEW:
            assert trap.request is not None
            if not (trap.request.fruitless(now) or self.ending):
                self.fault(f"{trap} got the fallback without a reason")
        elif trap.fate is Fate.RETRY:
            pending = self.pending[trap.ask]
            ready = [request for request in pending if request.fruitless(now)]
            if not ready and self.ending:
                ready = pending
            if ready:
                self._collect(trap, ready[0])
            elif trap.ask not in self.unsure:
                self.fault(f"{trap} got the fallback without a reason")
        elif not (self.ending or trap.ask in self.unsure):
            self.fault(f"{trap} got the fallback without a reason")

    def _in_a_race(self, ask: Ask) -> bool:
        """Whether something is due for this key that may have happened, or not yet."""
        now = self.now()
        if any(
            now >= trap.taken + min(ask.terms) or (trap.request is not None and trap.request.overdue(now))
            for trap in self.of_key(ask)
            if trap.taken is not None
        ):
            return True
        results = 0
        for request in sum(self.pending.values(), []):
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
        for trap in [trap for trap in self.traps.values() if trap.open]:
            if trap.taken is not None and trap.kind is not Kind.OURS:
                self.fault(f"{trap} was taken and is not answered")
            elif trap.taken is not None:
                self._check_open(trap, now)
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

    def _check_results(self, now: float) -> None:
        """Results are kept for a while, and only so many."""
        for requests in self.pending.values():
            for request in list(requests):
                done = request.run is not None and request.run.ended
                if request.kept is None and (done or request.overdue(now)):
                    request.kept = now
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


class Access:
    """An access to slow memory that is under way."""

    def __init__(self, trap: Trap, stubborn: bool):
        self.trap = trap
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
        self.lost = False
        self.slow_vcpus: set[int] = set()
        self.writing: dict[int, anyio.Event] = {}
        self.accesses: list[Access] = []

    async def run(self, traps, sink):
        self.sink = sink
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed)
            self.started.set()
            await self.over.wait()
            tasks.cancel_scope.cancel()
        if self.failure is not None:
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
        access = Access(trap, address >= STUBBORN)
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
        cut_off = access.stubborn and (
            requests.ending or trap.taken is None or requests.now() >= trap.taken + trap.ask.terms.hard
        )
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

    @method(SOFT)
    async def soft(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(BOTH, soft_timeout=TERMS[BOTH].soft, timeout=TERMS[BOTH].hard)
    async def both(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(STRICT, soft_timeout=TERMS[STRICT].soft, timeout=TERMS[STRICT].hard)
    async def strict(self, vmi, packet):
        return await self._serve(vmi, packet)

    async def _serve(self, vmi, packet):
        trap = self.requests.traps[packet.value4]
        run = trap.request.run if trap.request is not None and trap.ask.detour else None
        run = run or self.requests.begins(trap)
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
                    self.requests.ending = True
                    self.requests.stopped_at = min(self.requests.stopped_at, self.requests.now())
                    raise SystemExit(3)
                case Order.CANCEL_ITSELF:
                    return await self._cancel_itself(run)
                case Order.CANCEL_ITS_TASK:
                    return await self._cancel_its_task(run)
                case Order.STEP:
                    await anyio.lowlevel.checkpoint()
                case order:
                    await self._access(vmi, run, order)

    async def _access(self, vmi, run, order):
        self.requests.waits()
        memory = vmi.memory
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
            if not (self.requests.ending or run.request.overdue(self.requests.now())):
                self.requests.fault(f"a handler was cut off from memory too early: {run.ask}")
            raise

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
        raise


class Serial(Free):
    """The same, one at a time."""

    REQUEST = SERIAL
    serial = True


class Behind(Free):
    """The same, behind a dispatcher."""

    REQUEST = PASSED


class Passes(BridgeDispatch):
    """Asked first; passes every request on, at once or when it is told something."""

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
    GUEST_LOST = "the backend loses the guest"


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

    # What may happen.

    def read(self, on: bool) -> None:
        self.requests.reading = on
        if on:
            self.read_on.set()
        elif self.read_on.is_set():
            self.read_on = anyio.Event()

    def end(self, how: End) -> None:
        """Begin the end."""
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
        self.finish_writes()
        for access in list(self.vm.accesses):
            self.vm.finish(access)
        for run in self.requests.alive:
            run.let_go.set()
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
            if self.vm.failure is not None:
                assert self.error is not None
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


# --- the machine --------------------------------------------------------------------

ORDERS = st.sampled_from(Order)
ASKS = st.builds(
    Ask,
    space=st.sampled_from([0x1000, 0x2000]),
    request=st.sampled_from([FREE, SERIAL, PASSED]),
    method=st.sampled_from([SOFT, PATIENT, BOTH, STRICT]),
    what=st.integers(0, 1),
    first=st.sampled_from([0, 0, 0, *(order.value for order in Order if order is not Order.EXIT)]),
    detour=st.integers(0, 1),
).map(lambda ask: ask._replace(**{"method": SOFT} if ask.request == PASSED else {"detour": 0}))
VCPU = st.integers(0, VCPUS - 1)
WHICH = st.integers(0, 5)


class TrapLife(RuleBasedStateMachine):
    """The moves. Each is made in one piece; the loop runs in between."""

    loop: ClassVar[type[Asyncio] | type[Trio]]

    def __init__(self):
        super().__init__()
        self.stack = ExitStack()
        self.batch: list[Callable[[], None]] = []
        self.batch_size = 1
        self.steps = self.lag = 0
        self.broken = False
        self.stage: Stage | None = None

    @initialize(
        seed=st.integers(0, 0xFFFF),
        asks=st.lists(ASKS, min_size=1, max_size=4),
        manners=st.lists(st.sampled_from(Manner), min_size=1, max_size=4),
        life=st.integers(0, 40),
        finale=st.sampled_from(End),
    )
    def begins(self, seed, asks, manners, life, finale):
        """`life` is the number of steps before which nothing comes to its end."""
        trio._core._run._r.seed(seed)
        self.asks, self.life, self.finale = asks, life, finale
        self.portal = self.stack.enter_context(
            anyio.from_thread.start_blocking_portal(self.loop.name, self.loop.options())
        )
        self.call(self._set_up, manners)
        self.portal.start_task_soon(self.stage.play)
        self.step(lambda: None)

    async def _set_up(self, manners):
        self.tasks = len(anyio.get_running_tasks())
        self.stage = Stage(manners)

    # Steps.

    def call(self, function, *args):
        try:
            return self.portal.start_task_soon(function, *args).result(20)
        except BaseException:
            self.broken = True
            raise

    def step(self, move: Callable[[], object]) -> None:
        """Make a move, or keep it for those that are made at once."""
        self.steps += 1
        self.batch.append(move)
        self.lag -= 1
        if self.lag == 0:
            self.batch.append(lambda: self.stage.read(True))
        if len(self.batch) >= self.batch_size:
            self.flush()

    def flush(self) -> None:
        moves, self.batch, self.batch_size = self.batch, [], 1
        self.call(self._make, moves)

    async def _make(self, moves):
        for move in moves:
            move()
        await self.loop.quiet()
        self.stage.check()

    # The guest.

    @rule(vcpu=VCPU, which=WHICH)
    def a_guest_asks(self, vcpu, which):
        self.step(lambda: self._trap(vcpu, Kind.OURS, self.asks[which % len(self.asks)]))

    @rule(which=WHICH)
    def a_guest_that_was_told_to_wait_asks_again(self, which):
        def move():
            told = [t for t in self.stage.requests.traps.values() if t.reply is Reply.WAIT]
            if told:
                trap = told[-1 - which % len(told)]
                self._trap(trap.vcpu, Kind.OURS, trap.ask)

        self.step(move)

    @rule(vcpu=VCPU, kind=st.sampled_from(Kind), which=WHICH)
    def a_guest_traps_otherwise(self, vcpu, kind, which):
        self.step(lambda: self._trap(vcpu, kind, self.asks[which % len(self.asks)]))

    def _trap(self, vcpu: int, kind: Kind, ask: Ask) -> None:
        traps = self.stage.requests.traps
        trap = traps[len(traps) + 1] = Trap(len(traps) + 1, vcpu, kind, ask)
        self.stage.vm.trap(trap)

    # The handlers.

    @rule(which=WHICH, order=ORDERS)
    def a_handler_is_told(self, which, order):
        if order is not Order.EXIT or self.steps >= self.life:
            self.step(lambda: self._each(which, lambda run: run.tell(order)))

    @rule(which=WHICH)
    def a_handler_answers(self, which):
        self.step(lambda: self._each(which, lambda run: run.tell(Order.ANSWER)))

    @rule(which=WHICH)
    def a_handler_has_unwound(self, which):
        self.step(lambda: self._each(which, lambda run: run.let_go.set()))

    def _each(self, which: int, does: Callable[[Run], object]) -> None:
        alive = self.stage.requests.alive
        if alive:
            does(alive[which % len(alive)])

    # The backend.

    @rule(which=WHICH)
    def an_access_is_done(self, which):
        def move():
            accesses = self.stage.vm.accesses
            if accesses:
                self.stage.vm.finish(accesses[which % len(accesses)])

        self.step(move)

    @rule(vcpu=VCPU)
    def the_next_write_is_slow(self, vcpu):
        self.step(lambda: self.stage.vm.slow_vcpus.add(vcpu))

    @rule(which=WHICH)
    def a_slow_write_is_done(self, which):
        def move():
            writing = list(self.stage.vm.writing.values())
            if writing:
                writing[which % len(writing)].set()

        self.step(move)

    @precondition(lambda self: self.steps >= self.life)
    @rule()
    def the_backend_loses_the_vm(self):
        self.step(lambda: setattr(self.stage.vm, "lost", True))

    # The consumer, and the end.

    @rule(steps=st.integers(1, 6))
    def the_consumer_lags(self, steps):
        self.lag = steps + 1
        self.step(lambda: self.stage.read(False))

    @precondition(lambda self: self.steps >= self.life)
    @rule(how=st.sampled_from(End))
    def the_end_begins(self, how):
        self.step(lambda: self.stage.end(how))

    # Time.

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 3.0]))
    def time_passes(self, seconds):
        self.step(lambda: self.loop.advance(seconds))

    @rule(moves=st.integers(2, 4))
    def what_follows_happens_at_once(self, moves):
        self.batch_size = moves

    # The end of the play.

    def teardown(self):
        try:
            if not self.broken and self.stage is not None:
                if self.batch:
                    self.flush()
                self._end(self.stage)
        finally:
            if self.broken and self.stage is not None:
                with suppress(Exception):
                    self.portal.start_task_soon(self._give_up).result(5)
            self.stack.close()

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
    monkeypatch.setattr("vmibridge.workers._clock", anyio.current_time)
    monkeypatch.setattr("vmibridge.workers._MAX_IDLE", 1)
    monkeypatch.setattr("vmibridge.server.OUTCOMES_AHEAD", OUTCOMES_AHEAD)
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def play(machine, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


MACHINES = [
    pytest.param(TrapLifeOnAsyncio, id="asyncio"),
    pytest.param(TrapLifeOnTrio, id="trio"),
]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens(machine):
    play(machine, examples=200, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens_for_long(machine):
    play(machine, examples=5000, steps=80)
