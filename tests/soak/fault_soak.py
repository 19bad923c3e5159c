"""The fault soak: a long run in which many things go wrong, and what has to hold all the same.

    python tests/soak/fault_soak.py [--traps N] [--lanes N] [--loop asyncio|uvloop|trio]
                                    [--seed N] [--json]

A guest that is made up sends N traps over its lanes (vCPUs), several at a time in each. One in
a hundred raises, one hangs past its hard deadline, one is cancelled from within, one has a bad
pointer; others run past their soft deadline, are retried, or never are; are denied, unknown, or
not ours. The table `KINDS` holds them all. On top of the N come the retries, and at the end:

1. Nothing is open, and all that was told to wait is collected or has expired.
2. As many handlers as there are places run at once: none was lost on the way.
3. Ordinary traps use up the quota of the VM, to the last request; all that follow are denied.
4. Meanwhile a handler hangs in each of as many lanes again, with a trap queued behind it. The
   server is stopped, and answers them.

It fails, with exit status 1, unless:

- each trap is answered once, in the order of its lane, with the reply that its kind calls for,
  and has one outcome that says the same;
- each run of a handler that was told to wait ends in a reply, or is counted as uncollected;
- a quota lets through what it has, and no more;
- guest memory is touched only while the vCPU stands still;
- the memory of the process stays flat: the median of its second half within 5 % of the first's;
- each request goes from state to state as the table of the engine says;
- no task, thread, context or pending request is left, and nothing was logged but what was asked
  for.

What is sent is fixed by the seed; when it is retried is not. Where time decides between two
outcomes, both are allowed, and sums have to agree. Nothing here depends on how fast the
machine is.
"""

import argparse
import asyncio
import gc
import itertools
import json
import logging
import math
import resource
import statistics
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from heapq import heappop, heappush
from pathlib import Path
from random import Random
from typing import NamedTuple

import anyio

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    Registers,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.engine.engine import Engine
from vmibridge.engine.policy import Policy, Quota, Rate
from vmibridge.engine.request import Request, Worker
from vmibridge.engine.workers import Workers
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.vm.backend import Backend, GuestEnd, VcpuEnd
from vmibridge.vm.memory import MAX_ACCESS, GuestMemory

# As a command it is started with its own folder in the path only.
sys.path.append(str(Path(__file__).parents[1]))
from transitions import watched_states

LOOPS = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}

MAGIC = 0x534F_414B
STAMP = 0x5747
FALLBACK = 0xFA11
DENIED = 0xDE41

# Seconds.
SOFT = 0.004
SLOW = 0.006
HARD = 0.02
LONG = 30.0
"""For handlers that are not to meet a deadline, however busy the machine is."""
RESULT_TIMEOUT = 0.2
STALLED = 60.0
"""Without any answer for so long, the soak gives up."""

MOST_WRONGS = 100
"""It gives up after so many, too."""

DEPTH = 3
"""Traps that a lane has open at a time; a vCPU has one, but the order is promised for more."""

# The quotas, and how much of them is used: see `_Process`.
BURST, RATE = 16, 32.0
PROCESS_USES = 8
DEBT = 4 << 20
BYTES_BURST, BYTES_RATE = 64 << 10, 512 << 10
DEBT_SECONDS = (DEBT - BYTES_BURST) / BYTES_RATE
MOST_SPACES = 8192
HAMMER_LENGTH = 40

# Physical memory: some that works, and some that does not. The lanes have their slots from 0.
MEMORY = 1 << 20
ASK_SLOTS = 1 << 19
DELAYED, HUGE, BROKEN, STUCK = (n << 32 for n in range(1, 5))
DELAY = 0.002

WARM_UP = 0.15
"""Of the traps, before memory is looked at."""
SAMPLES = 80
FLAT = 0.05
FEWEST_FOR_FLAT = 500_000
"""Traps; in a shorter run the memory of the process says nothing."""


class Reply(Enum):
    """What a guest finds in its registers."""

    NATIVE = "native"
    UNTOUCHED = "untouched"
    FALLBACK = "fallback"
    WAIT = "wait"
    DENIED = "denied"
    ANSWER = "answer"
    LOST = "lost"
    WRONG = "wrong"


REPLY_OF = {
    OutcomeKind.HANDLED: Reply.ANSWER,
    OutcomeKind.REJECTED: Reply.FALLBACK,
    OutcomeKind.UNMATCHED: Reply.UNTOUCHED,
    OutcomeKind.WAITING: Reply.WAIT,
    OutcomeKind.TIMEOUT: Reply.FALLBACK,
    OutcomeKind.FAILED: Reply.FALLBACK,
    OutcomeKind.DENIED: Reply.DENIED,
    OutcomeKind.CANCELLED: Reply.FALLBACK,
}


class Kind(IntEnum):
    """What a trap is about; also its method code. See `KINDS`."""

    __hash__ = int.__hash__  # That of an enum is slow.

    ANSWER = 1
    YIELD = 2
    SLEEP = 3
    MEMORY = 4
    SCOPES = 5
    FORWARDED = 6
    RAISE = 10
    HANG = 11
    CANCEL = 12
    BAD_POINTER = 13
    LOST = 14
    SLOW = 20
    ECHO = 21
    SLOW_FAIL = 22
    SLOW_READ = 23
    SLOW_HANG = 24
    NEVER = 25
    NEVER_READ = 26
    NEVER_HANG = 27
    REJECT = 30
    UNKNOWN_REQUEST = 31
    UNKNOWN_METHOD = 32
    NOT_OURS = 33
    REAL_MODE = 34
    RING = 40
    GREEDY = 41
    IN_DEBT = 42
    HAMMER = 43
    OVER = 44
    TURN = 50
    TURN_HANG = 51
    TURN_SLOW = 52
    GATHER = 60
    LAST = 61


class Spec(NamedTuple):
    """How often a kind is sent, in a thousand draws, and what may come of it."""

    share: float
    outcomes: frozenset[OutcomeKind]


def _spec(share: float, *outcomes: str) -> Spec:
    return Spec(share, frozenset(map(OutcomeKind, outcomes)))


KINDS = {
    # Ordinary: at once, after a task switch, after a moment, by guest memory, in scopes of its
    # own, and by a handler behind a dispatcher that passes on.
    Kind.ANSWER: _spec(640, "handled"),
    Kind.YIELD: _spec(120, "handled"),
    Kind.SLEEP: _spec(20, "handled"),
    Kind.MEMORY: _spec(80, "handled"),
    Kind.SCOPES: _spec(10, "handled"),
    Kind.FORWARDED: _spec(10, "handled"),
    # Faults of handlers, and answers that the VM does not take.
    Kind.RAISE: _spec(10.5, "failed"),
    Kind.HANG: _spec(10.5, "timeout"),
    Kind.CANCEL: _spec(10.5, "cancelled"),
    Kind.BAD_POINTER: _spec(10.5, "failed"),
    Kind.LOST: _spec(1, "failed"),
    # Past the soft deadline, with retries that come, and with retries that never do.
    Kind.SLOW: _spec(6, "handled", "waiting", "denied"),
    Kind.ECHO: _spec(1, "handled", "waiting", "denied"),
    Kind.SLOW_FAIL: _spec(2, "failed", "waiting", "denied"),
    Kind.SLOW_READ: _spec(4, "handled", "waiting", "denied"),
    Kind.SLOW_HANG: _spec(2, "timeout", "waiting", "denied"),
    Kind.NEVER: _spec(6, "handled", "waiting"),
    Kind.NEVER_READ: _spec(2, "handled", "waiting", "timeout"),
    Kind.NEVER_HANG: _spec(2, "waiting", "timeout"),
    # Nobody's.
    Kind.REJECT: _spec(5, "rejected"),
    Kind.UNKNOWN_REQUEST: _spec(10, "unmatched"),
    Kind.UNKNOWN_METHOD: _spec(10, "rejected"),
    Kind.NOT_OURS: _spec(20),
    Kind.REAL_MODE: _spec(2, "failed"),
    # Denied: by the ring; after a reading of `DEBT` bytes; from the `BURST`th of `HAMMER_LENGTH`
    # on, but for those that the rate lets through.
    Kind.RING: _spec(10, "denied"),
    Kind.GREEDY: _spec(3, "handled"),
    Kind.IN_DEBT: _spec(0, "denied", "handled"),
    Kind.HAMMER: _spec(0.5, "denied", "handled"),
    # Of a serial handler.
    Kind.TURN: _spec(5, "handled"),
    Kind.TURN_HANG: _spec(0.5, "timeout"),
    Kind.TURN_SLOW: _spec(0.5, "handled", "waiting", "denied"),
    # At the end only.
    Kind.GATHER: _spec(0, "handled"),
    Kind.LAST: _spec(0, "cancelled", "denied"),
    Kind.OVER: _spec(0, "denied"),
}

KIND_OF = {int(kind): kind for kind in Kind}
REPLIES = {kind: {REPLY_OF[outcome] for outcome in spec.outcomes} for kind, spec in KINDS.items()}
REPLIES[Kind.NOT_OURS] = {Reply.NATIVE}
REPLIES[Kind.LOST] = {Reply.LOST}

RETRIED = {
    Kind.SLOW, Kind.ECHO, Kind.SLOW_FAIL, Kind.SLOW_READ, Kind.SLOW_HANG, Kind.TURN_SLOW
}  # fmt: skip
NEVER_RETRIED = {Kind.NEVER, Kind.NEVER_READ, Kind.NEVER_HANG}
MAY_WAIT = RETRIED | NEVER_RETRIED
OWN_PROCESS = MAY_WAIT | {Kind.GREEDY}
REQUESTS = {
    Kind.FORWARDED: 3,
    Kind.TURN: 2,
    Kind.TURN_HANG: 2,
    Kind.TURN_SLOW: 2,
    Kind.UNKNOWN_REQUEST: 9,
}
RETRY_AFTER = (0, 0, 0, 1, 3, 64)
"""Traps of the lane before its retry; at the last, the result has often expired."""


# --- what is counted --------------------------------------------------------------------


class Ledger:
    """What was sent and what came of it, and what is wrong."""

    def __init__(self) -> None:
        self.planned: Counter[Kind] = Counter()
        """First traps of the requests, the closing ones not included."""
        self.sent: Counter[Kind] = Counter()
        self.replies: Counter[tuple[Kind, Reply]] = Counter()
        self.outcomes: Counter[tuple[Kind, OutcomeKind]] = Counter()
        self.starts: Counter[Kind] = Counter()
        """Handlers that were begun, of kinds that may wait."""
        self.ends: Counter[Kind] = Counter()
        """Final replies to those kinds."""
        self.answered = 0
        self.let_through = 0
        self.longest_hang = 0.0
        self.wrongs = 0
        self.first_wrongs: list[str] = []

    def wrong(self, what: str) -> None:
        """Something is not as it has to be."""
        self.wrongs += 1
        if len(self.first_wrongs) < 20:
            self.first_wrongs.append(what)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong(what)

    @property
    def all_sent(self) -> int:
        return self.sent.total()

    @property
    def slow(self) -> str:
        """What ran past its soft deadline, for people."""
        told = (
            f"{kind.name} {began} began, {self.ends[kind]} ended, {self.sent[kind]} sent"
            for kind, began in sorted(self.starts.items())
        )
        return "; ".join(told)

    def sent_of(self, kinds: set[Kind]) -> int:
        return sum(self.sent[kind] for kind in kinds)


class Log(logging.Handler):
    """Counts what is expected in the log; anything else from warnings up is wrong."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(logging.WARNING)
        self._ledger = ledger
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        for known in ("failed on method", "was not written"):
            if known in text:
                self.counts[known] += 1
                return
        told = record.getMessage()
        if "16-bit" in told:
            self.counts["16-bit"] += 1
        else:
            self._ledger.wrong(f"in the log: {record.name}: {told}")


# --- the handlers -----------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


def on_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not asyncio.CancelledError


def plus_one(packet) -> BridgeResponse[None]:
    return BridgeResponse(value1=packet.value1 + 1)


async def recurse(depth: int) -> int:
    return await recurse(depth + 1) + 1


async def raise_lookup_error() -> None:
    await anyio.sleep(0)
    raise LookupError("on purpose")


async def fail_on_the_way_out() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        raise LookupError("on the way out")


class Faults(BridgeHandler[None]):
    """Does what the method says; value2 picks one of several ways to."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = STAMP

    def __init__(self, ledger: Ledger, places: int, lanes: int) -> None:
        self._ledger = ledger
        self.running: Counter[tuple[Kind, int]] = Counter()
        """Those that may wait, by kind and request."""
        self._places = places
        self._lanes = lanes
        self.gathered = 0
        self.most_gathered = 0
        self._all_there = anyio.Event()
        self.hanging = 0
        self.all_hang = anyio.Event()

    @method(Kind.ANSWER)
    async def answer(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.HAMMER)
    async def hammer(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.IN_DEBT)
    async def in_debt(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.YIELD)
    async def yield_(self, vmi, packet):
        for _ in range(1 + packet.value2 % 3):
            await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.SLEEP)
    async def sleep(self, vmi, packet):
        await anyio.sleep(0.0002 * (1 + packet.value2 % 8))
        return plus_one(packet)

    @method(Kind.MEMORY)
    async def memory(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, 8)
        if packet.value2 & 1:
            await anyio.sleep(0)
        await vmi.memory.write(packet.value1 + 8, data[::-1])
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(Kind.SCOPES)
    async def scopes(self, vmi, packet):
        way = packet.value2 % 3
        if way == 0:
            with anyio.move_on_after(0):
                await anyio.sleep_forever()
        elif way == 1:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                tasks.start_soon(anyio.sleep, 0)
                await anyio.sleep(0)
                tasks.cancel_scope.cancel()
        else:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.LOST)
    async def lost(self, vmi, packet):
        if packet.value2 & 1:
            await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.REJECT)
    async def reject(self, vmi, packet):
        if packet.value2 & 1:
            await anyio.sleep(0)

    @method(Kind.RAISE)
    async def fail(self, vmi, packet):
        way = packet.value2 % 11
        if packet.value2 & 16:
            await anyio.sleep(0)
        if way == 0:
            return 5
        if way == 1:
            return BridgeResponse(value1=1 << 64)
        if way == 2:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(raise_lookup_error)
                tasks.start_soon(anyio.sleep_forever)
        if way == 3:
            await recurse(0)
        if way == 4:
            raise Unspeakable
        if way == 5:
            await vmi.memory.read_physical(BROKEN, 8)
        if way == 6:
            with anyio.fail_after(0.001):
                await anyio.sleep_forever()
        if way == 10 and not on_trio():
            async with asyncio.timeout(0.001):
                await anyio.sleep_forever()
        if way == 7:
            raise MemoryError
        if way == 8:
            raise StopIteration
        raise LookupError("on\npurpose")

    @method(Kind.HANG, timeout=HARD)
    async def hang(self, vmi, packet):
        way = packet.value2 % 9
        if way == 0:
            while True:
                await anyio.sleep(HARD / 4)
        elif way == 7:
            while True:
                await vmi.memory.read_physical(DELAYED, 8)
        elif way == 8:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail_on_the_way_out)
                tasks.start_soon(fail_on_the_way_out)
                await anyio.sleep_forever()
        elif way == 1:
            # Takes its time to end, and is cut off meanwhile.
            with anyio.move_on_after(LONG, shield=True):
                try:
                    while True:
                        await vmi.memory.read(0, 8)
                        await anyio.sleep(HARD / 4)
                except GuestMemoryError:
                    await anyio.sleep(HARD / 4)
        elif way == 2:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                return plus_one(packet)
        elif way == 3:
            await fail_on_the_way_out()
        elif way == 4:
            await vmi.memory.read_physical(STUCK, 8)
        elif way == 5:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                tasks.start_soon(anyio.sleep, 0)
        else:
            await anyio.sleep_forever()
        return plus_one(packet)

    @method(Kind.CANCEL)
    async def cancel(self, vmi, packet):
        way = packet.value2 % 6
        if way == 0 and not on_trio():
            await anyio.sleep(0)
            raise asyncio.CancelledError
        if way == 1 and not on_trio():
            # Something that it awaits is cancelled by others.
            task = asyncio.ensure_future(asyncio.sleep(3600))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        if way == 3 and not on_trio():
            # Its own task is, by means that anyio does not know of.
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await anyio.sleep(0)
        # The cancellation of a scope of its own gets out of it.
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class() as error:
                kept = error
        if way == 2:
            await anyio.sleep(0)
        try:
            raise kept
        finally:
            del kept

    @method(Kind.BAD_POINTER)
    async def bad_pointer(self, vmi, packet):
        address, way = packet.value1, packet.value2 % 6
        if packet.value2 & 64:
            await anyio.sleep(0)
        if way == 0:
            await vmi.memory.read(address, MAX_ACCESS + 1 + packet.value2)
        elif way == 1:
            await vmi.memory.read((1 << 64) - 4, 8)
        elif way == 2:
            await vmi.memory.write(address, b"eight by")
        elif way == 3:
            await vmi.memory.read_string(address, limit=64)
        elif way == 4:
            await vmi.memory.read_physical(address, 8)
        else:
            await vmi.memory.read(address, 8)
        self._ledger.wrong(f"a bad pointer was followed: way {way}")

    @method(Kind.GREEDY)
    async def greedy(self, vmi, packet):
        await vmi.memory.read_physical(HUGE, DEBT)
        return plus_one(packet)

    @contextmanager
    def _slow(self, kind: Kind, packet, *, asked_at_once: int = 1):
        """One run of a kind that may wait: a retry must not begin another one beside it."""
        key = (kind, packet.value3 or packet.value1)
        self._ledger.starts[kind] += 1
        self.running[key] += 1
        self._ledger.check(
            self.running[key] <= asked_at_once, f"one {kind.name} runs {self.running[key]} times"
        )
        try:
            yield
        finally:
            self.running[key] -= 1
            if not self.running[key]:
                del self.running[key]

    @method(Kind.SLOW, soft_timeout=SOFT)
    async def slow(self, vmi, packet):
        with self._slow(Kind.SLOW, packet):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.ECHO, soft_timeout=SOFT)
    async def echo(self, vmi, packet):
        # When the result has expired, both begin anew, and none was told to wait as yet.
        with self._slow(Kind.ECHO, packet, asked_at_once=2):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.SLOW_FAIL, soft_timeout=SOFT)
    async def slow_fail(self, vmi, packet):
        with self._slow(Kind.SLOW_FAIL, packet):
            await anyio.sleep(SLOW)
            raise LookupError("late")

    @method(Kind.SLOW_READ, soft_timeout=SOFT)
    async def slow_read(self, vmi, packet):
        with self._slow(Kind.SLOW_READ, packet):
            await anyio.sleep(SLOW * (packet.value2 % 2))
            data = await vmi.memory.read_physical(DELAYED + packet.value1, 8)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(Kind.SLOW_HANG, soft_timeout=SOFT, timeout=HARD)
    async def slow_hang(self, vmi, packet):
        with self._slow(Kind.SLOW_HANG, packet):
            await anyio.sleep_forever()

    @method(Kind.NEVER, soft_timeout=SOFT)
    async def never(self, vmi, packet):
        with self._slow(Kind.NEVER, packet):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.NEVER_READ, soft_timeout=SOFT, timeout=HARD)
    async def never_read(self, vmi, packet):
        with self._slow(Kind.NEVER_READ, packet):
            await anyio.sleep(SLOW)
            await vmi.memory.read(0, 8)
        return plus_one(packet)

    @method(Kind.NEVER_HANG, soft_timeout=SOFT, timeout=HARD)
    async def never_hang(self, vmi, packet):
        with self._slow(Kind.NEVER_HANG, packet):
            await anyio.sleep_forever()

    @method(Kind.RING)
    async def ring(self, vmi, packet):
        self._ledger.wrong("a denied trap reached its handler, by its ring")

    @method(Kind.OVER)
    async def over(self, vmi, packet):
        self._ledger.wrong("a denied trap reached its handler, over the quota of the VM")

    @method(Kind.GATHER)
    async def gather(self, vmi, packet):
        self.gathered += 1
        self.most_gathered = max(self.most_gathered, self.gathered)
        if self.gathered == self._places:
            self._all_there.set()
        await self._all_there.wait()
        await anyio.sleep(0)
        self.gathered -= 1
        return plus_one(packet)

    @method(Kind.LAST, timeout=3600)
    async def last(self, vmi, packet):
        self.hanging += 1
        if self.hanging == self._lanes:
            self.all_hang.set()
        await anyio.sleep_forever()


class InTurn(BridgeHandler[None]):
    """Answers one at a time."""

    MAGIC = MAGIC
    REQUEST = 2
    VERIFY_VALUE4 = STAMP
    serial = True

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._running = 0

    @contextmanager
    def _alone(self):
        self._running += 1
        self._ledger.check(self._running == 1, "a serial handler runs twice at a time")
        try:
            yield
        finally:
            self._running -= 1

    @method(Kind.TURN)
    async def turn(self, vmi, packet):
        with self._alone():
            await anyio.sleep(0.0005 * (packet.value2 % 2))
        return plus_one(packet)

    @method(Kind.TURN_HANG, timeout=HARD)
    async def turn_hang(self, vmi, packet):
        with self._alone():
            await anyio.sleep_forever()

    @method(Kind.TURN_SLOW, soft_timeout=SOFT)
    async def turn_slow(self, vmi, packet):
        self._ledger.starts[Kind.TURN_SLOW] += 1
        with self._alone():
            await anyio.sleep(SLOW)
        return plus_one(packet)


class PassesOn(BridgeDispatch):
    """Waits, and leaves the request to whoever is behind."""

    def contracts(self):
        return [BridgeContract(REQUESTS[Kind.FORWARDED], MAGIC)]

    async def dispatch(self, vmi, packet):
        await anyio.sleep(0)
        return Outcome(OutcomeKind.UNMATCHED, packet)


class Behind(BridgeHandler[None]):
    MAGIC = MAGIC
    REQUEST = REQUESTS[Kind.FORWARDED]
    VERIFY_VALUE4 = STAMP

    async def handle(self, vmi, packet):
        return plus_one(packet)


# --- the guest --------------------------------------------------------------------------


class _Process:
    """An address space, with a CR3 that is made up, and what the quota has to make of it."""

    __slots__ = ("fed", "in_debt_since", "let_through", "root", "since")

    def __init__(self, root: int) -> None:
        self.root = root
        self.fed = 0
        self.let_through = 0
        self.since = 0.0
        self.in_debt_since: float | None = None


class _Ask:
    """A request that may be told to wait, and is then asked again."""

    __slots__ = ("echoed", "kind", "process", "retried", "seqs", "values")

    def __init__(self, kind: Kind, values: tuple[int, int, int, int], process: _Process) -> None:
        self.kind = kind
        self.values = values
        self.process = process
        self.seqs: set[int] = set()
        self.echoed = False
        self.retried = False


class _Sent:
    """A trap that is open."""

    __slots__ = ("answered", "ask", "expected", "kind", "nth", "process", "seq", "slot")

    def __init__(self, seq: int, kind: Kind, process: _Process) -> None:
        self.seq = seq
        self.kind = kind
        self.process = process
        self.nth = process.fed
        self.ask: _Ask | None = None
        self.expected = 0
        self.slot = 0
        self.answered = False


class _Lane:
    """A vCPU: what it will send, and what it has open, in order."""

    __slots__ = (
        "again",
        "debtor",
        "hammers",
        "last_outcome",
        "number",
        "open",
        "plan",
        "process",
        "steps",
        "uses_left",
        "waiting",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.plan: Iterator[tuple[Kind, int]] = iter(())
        self.open: deque[_Sent] = deque()
        self.again: list[tuple[int, int, _Ask]] = []
        self.steps = 0
        self.process: _Process | None = None
        self.uses_left = 0
        self.hammers = False
        self.debtor: _Process | None = None
        self.waiting = False
        self.last_outcome = 0


def draw(random: Random, count: int) -> Iterator[tuple[Kind, int]]:
    """Kinds at random, by their shares, and a number that picks the way: `count` or a few more."""
    kinds = [kind for kind, spec in KINDS.items() if spec.share]
    shares = list(itertools.accumulate(KINDS[kind].share for kind in kinds))
    while True:
        for kind in random.choices(kinds, cum_weights=shares, k=64):
            if count <= 0:
                return
            series = [kind]
            if kind is Kind.GREEDY:
                series = [kind, Kind.IN_DEBT]
            elif kind is Kind.HAMMER:
                series = [kind] * HAMMER_LENGTH
            count -= len(series)
            for each in series:
                yield each, random.getrandbits(12)


def same(kind: Kind, count: int) -> Iterator[tuple[Kind, int]]:
    return itertools.repeat((kind, 0), count)


class Guest(Backend):
    """Sends what its lanes have planned, and checks each reply. It keeps what is open only."""

    def __init__(
        self, ledger: Ledger, handler: Faults, *, traps: int, lanes: int, seed: int, quota: int
    ) -> None:
        super().__init__("soak")
        self.lanes = [_Lane(number) for number in range(lanes)]
        for number, lane in enumerate(self.lanes):
            share = traps // lanes + (number < traps % lanes)
            lane.plan = draw(Random(f"{seed}.{number}"), share)
        self.in_plan = True
        """Whether it is still at what was planned: the time in which memory is looked at."""
        self.done = False
        """Whether it came to the end of what it does."""
        self.stop_server: Callable[[], None] = lambda: None
        self.uncollected: Callable[[], int] = lambda: 0
        self._planned_lanes = lanes
        self._ledger = ledger
        self._handler = handler
        self._quota = quota
        self._sink = None
        self._memory = bytearray(MEMORY)
        self._huge = bytes(DEBT)
        self._ask_slots = [ASK_SLOTS + 8 * n for n in range(4096)]
        self._seq = 0
        self._roots = itertools.count(1)
        self._ties = itertools.count()
        self._hungry: deque[_Lane] = deque()
        self._open = 0
        self._answered = anyio.Event()
        self._running = anyio.CancelScope()

    async def run(self, traps, sink):
        self._sink = sink
        with self._running:
            try:
                await self._send(self.lanes)
                self.in_plan = False
                await self._wait_for_the_last_results()
                await self._fill_the_places()
                await self._leave_some_open()
                await self._use_up_the_quota()
                self.done = True
                self.stop_server()
            except TrapQueueClosedError:
                pass
            await anyio.sleep_forever()
        return GuestEnd(tuple(VcpuEnd(lane.number, "stopped") for lane in self.lanes))

    def stop(self) -> None:
        self._running.cancel()

    # What it does, in order.

    async def _send(self, lanes: list[_Lane]) -> None:
        """Send what the lanes have planned, and wait until all of it is answered."""
        for lane in lanes:
            self._feed_soon(lane)
        while True:
            while self._hungry:
                lane = self._hungry.popleft()
                lane.waiting = False
                while len(lane.open) < DEPTH:
                    event = self._next(lane)
                    if event is None:
                        break
                    try:
                        self._sink.put_nowait(event)
                    except anyio.WouldBlock:
                        await self._sink.put(event)
            if not self._open:
                return
            self._answered = anyio.Event()
            await self._answered.wait()

    async def _wait_for_the_last_results(self) -> None:
        """Results that nobody collects expire, and nothing has to happen for it."""
        ledger = self._ledger
        pauses = 0
        while ledger.starts.total() != ledger.ends.total() + self.uncollected():
            await anyio.sleep(RESULT_TIMEOUT / 4)
            # One that waits for memory has until its hard deadline.
            pauses += not self._handler.running
            if pauses > 100:
                break
        left = ledger.starts.total() - ledger.ends.total() - self.uncollected()
        ledger.check(not left, f"{left} results are neither collected nor expired: {ledger.slow}")

    async def _fill_the_places(self) -> None:
        """As many handlers as there are places, and some more."""
        places = 2 * len(self.lanes)
        more = self._more_lanes(places + 8)
        for lane in more:
            lane.plan = same(Kind.GATHER, 1)
        await self._send(more)
        most = self._handler.most_gathered
        self._ledger.check(
            most == places, f"{most} handlers waited at a time, there are {places} places"
        )

    async def _leave_some_open(self) -> None:
        """A handler that hangs, and a trap behind it, in each of so many lanes."""
        more = self._more_lanes(self._planned_lanes)
        for lane in more:
            for _ in range(2):
                await self._sink.put(self._make(lane, Kind.LAST, 0, self._new_process()))
        self._open -= 2 * len(more)
        await self._handler.all_hang.wait()

    async def _use_up_the_quota(self) -> None:
        """What is left of it, and then some; the hanging handlers have had theirs."""
        ledger, first = self._ledger, self.lanes[: self._planned_lanes]
        left = self._quota - ledger.let_through - self._handler.hanging
        ledger.check(left >= 0, f"the quota of {self._quota} let through {-left} more")
        for number, lane in enumerate(first):
            lane.plan = same(Kind.ANSWER, max(0, left // len(first) + (number < left % len(first))))
        await self._send(first)
        for lane in first:
            lane.plan = same(Kind.OVER, 1 + self._quota // 100 // len(first))
        await self._send(first)

    def _more_lanes(self, count: int) -> list[_Lane]:
        start = len(self.lanes)
        more = [_Lane(number) for number in range(start, start + count)]
        self.lanes += more
        return more

    # One trap.

    def _feed_soon(self, lane: _Lane) -> None:
        if not lane.waiting:
            lane.waiting = True
            self._hungry.append(lane)

    def _next(self, lane: _Lane) -> TrapEvent | None:
        """The next trap of a lane: a retry that is due, or what is planned, or a later retry."""
        again = lane.again
        if again and again[0][0] <= lane.steps:
            return self._ask(lane, heappop(again)[2])
        step = next(lane.plan, None)
        if step is None:
            return self._ask(lane, heappop(again)[2]) if again else None
        kind, way = step
        if self.in_plan:
            self._ledger.planned[kind] += 1
        return self._make(lane, kind, way, self._process_for(lane, kind))

    def _new_process(self) -> _Process:
        return _Process(next(self._roots) << 12)

    def _process_for(self, lane: _Lane, kind: Kind) -> _Process:
        if kind is Kind.IN_DEBT:
            assert lane.debtor is not None
            return lane.debtor
        if kind in OWN_PROCESS:
            lane.debtor = self._new_process()
            return lane.debtor
        if not lane.uses_left or lane.hammers != (kind is Kind.HAMMER):
            lane.hammers = kind is Kind.HAMMER
            lane.process = self._new_process()
            lane.uses_left = HAMMER_LENGTH if lane.hammers else PROCESS_USES
        lane.uses_left -= 1
        assert lane.process is not None
        return lane.process

    def _make(self, lane: _Lane, kind: Kind, way: int, process: _Process) -> TrapEvent:
        key = self._seq + 1
        values = (key, way, 0, 0)
        if kind in MAY_WAIT:
            if kind is Kind.SLOW_READ:
                values = (self._ask_slots.pop(), way, key, 0)
            return self._ask(lane, _Ask(kind, values, process))
        sent = self._open_trap(lane, kind, process)
        sent.expected = key + 1
        if kind is Kind.MEMORY:
            # No two traps that are open have the same slot.
            sent.slot = slot = (lane.number * (DEPTH + 1) + lane.steps % (DEPTH + 1)) * 16
            sent.expected = key * 0x9E37_79B9_7F4A_7C15 & (1 << 64) - 1
            self._memory[slot : slot + 8] = sent.expected.to_bytes(8, "little")
            values = (slot, way, 0, 0)
        elif kind is Kind.GREEDY:
            process.in_debt_since = time.monotonic()
        elif kind is Kind.BAD_POINTER:
            values = (MEMORY + (way << 12), way, 0, 0)
        return self._event(lane, sent, values, way)

    def _ask(self, lane: _Lane, ask: _Ask) -> TrapEvent:
        """A request that may be told to wait, for the first time or again."""
        sent = self._open_trap(lane, ask.kind, ask.process)
        sent.ask = ask
        address = ask.values[0]
        sent.expected = address + 1
        if ask.kind is Kind.SLOW_READ:
            # It is to read what is there while a trap of this request is open.
            ask.seqs.add(sent.seq)
            self._memory[address : address + 8] = sent.seq.to_bytes(8, "little")
        return self._event(lane, sent, ask.values, 0)

    def _open_trap(self, lane: _Lane, kind: Kind, process: _Process) -> _Sent:
        self._seq += 1
        self._open += 1
        lane.steps += 1
        if not process.fed:
            process.since = time.monotonic()
        process.fed += 1
        self._ledger.sent[kind] += 1
        sent = _Sent(self._seq, kind, process)
        lane.open.append(sent)
        return sent

    def _event(
        self, lane: _Lane, sent: _Sent, values: tuple[int, int, int, int], way: int
    ) -> TrapEvent:
        kind = sent.kind
        selector = REQUESTS.get(kind, 1) | kind << 16
        one, two, three, four = values
        # The low bits do not name the address space: it stays the same.
        control = {"cr3": sent.process.root | sent.seq & 0xFFF}
        reason, width, length = TrapReason.VMCALL, 64, 3
        if kind is Kind.NOT_OURS:
            reason = (
                TrapReason.PORT_IO,
                TrapReason.MSR,
                TrapReason.BREAKPOINT,
                TrapReason.CPUID,
                TrapReason.VMCALL,
            )[way % 5]
            registers = Registers(rax=0x4000_0000, rcx=0x4000_0000, rdx=selector, **control)
        elif kind is Kind.REAL_MODE:
            reason, width, length = TrapReason.CPUID, 16, 2
            registers = Registers(rax=MAGIC, rcx=selector, **control)
        elif kind is Kind.ANSWER and way & 15 < 4:
            if way & 15 == 0:
                reason = TrapReason.VMMCALL
            elif way & 15 == 1:
                width = 32
            else:
                reason, length = TrapReason.CPUID, 2
                width = 64 if way & 15 == 2 else 32
            if width == 64 and reason is TrapReason.CPUID:
                registers = Registers(rax=MAGIC, rcx=selector, r8=one, r9=two, **control)
            elif width == 64:
                registers = Registers(rcx=MAGIC, rdx=selector, r8=one, r9=two, **control)
            elif reason is TrapReason.CPUID:
                registers = Registers(rax=MAGIC, rcx=selector, rbx=one, rdx=two, **control)
            else:
                registers = Registers(rbp=MAGIC, rdx=selector, rsi=one, rdi=two, **control)
        else:
            if kind is Kind.BAD_POINTER and way & 256:
                # With paging, by tables that are not there.
                control |= {"cr0": 1 << 31 | 1, "cr4": 1 << 5, "efer": 1 << 10 | 1 << 8}
            registers = Registers(
                rcx=MAGIC, rdx=selector, r8=one, r9=two, r10=three, r11=four, **control
            )
        return TrapEvent(
            sent.seq,
            reason,
            registers,
            self.vm,
            lane.number,
            ip=0x1000,
            length=length,
            width=width,
            ring=3 if kind is Kind.RING else 0,
        )

    # Its answer.

    async def resume(self, event, writes):
        lane, ledger = self.lanes[event.vcpu], self._ledger
        sent = lane.open[0] if lane.open else None
        if sent is None or sent.seq != event.seq or sent.answered:
            opened = [each.seq for each in lane.open]
            ledger.wrong(f"trap {event.seq} is answered out of order or again, open: {opened}")
            return
        sent.answered = True
        if event.seq % 32 == 0:
            # A VM that takes its time.
            await anyio.sleep(0)
        lane.open.popleft()
        kind, process = sent.kind, sent.process
        reply = self._read_reply(event, writes, sent)
        if kind is Kind.LOST and reply is Reply.ANSWER:
            reply = Reply.LOST
        ledger.answered += 1
        ledger.replies[kind, reply] += 1
        if reply not in REPLIES[kind]:
            ledger.wrong(f"{kind.name} got {reply.value}, as {writes}")
        if reply is Reply.DENIED:
            self._denied(sent)
        elif reply is not Reply.NATIVE and kind is not Kind.LAST:
            self._let_through(sent)
        if sent.ask is not None:
            self._asked(lane, sent.ask, reply)
        elif kind is Kind.HAMMER and sent.nth == HAMMER_LENGTH:
            ledger.check(
                process.let_through >= BURST,
                f"a quota of {BURST} requests let {process.let_through} through",
            )
        if kind is not Kind.LAST:
            self._open -= 1
        self._feed_soon(lane)
        self._answered.set()
        if reply is Reply.LOST:
            raise BackendError("the VM did not take the answer")

    def _read_reply(self, event, writes, sent: _Sent) -> Reply:
        if writes is None:
            return Reply.NATIVE
        if writes.rip != event.ip + event.length:
            return Reply.WRONG
        one, *others = writes.values
        if others == [None, None, STAMP]:
            if one == Gate.WAIT:
                return Reply.WAIT
            if one != sent.expected and (sent.ask is None or one not in sent.ask.seqs):
                return Reply.WRONG
            if sent.kind is Kind.MEMORY:
                slot = sent.slot
                data = bytes(self._memory[slot : slot + 16])
                return Reply.ANSWER if data[:8] == data[:7:-1] else Reply.WRONG
            return Reply.ANSWER
        if others != [None, None, None]:
            return Reply.WRONG
        return {None: Reply.UNTOUCHED, FALLBACK: Reply.FALLBACK, DENIED: Reply.DENIED}.get(
            one, Reply.WRONG
        )

    def _denied(self, sent: _Sent) -> None:
        """Too many requests by now, or too many bytes: anything else is no reason."""
        process = sent.process
        if sent.kind in (Kind.RING, Kind.OVER, Kind.LAST, Kind.IN_DEBT):
            return
        # Another lane's retry may have been taken before this one.
        nth = sent.nth if sent.ask is None else process.fed
        self._ledger.check(
            nth > BURST, f"{sent.kind.name} is denied as request {nth} of its address space"
        )

    def _let_through(self, sent: _Sent) -> None:
        process, now = sent.process, time.monotonic()
        self._ledger.let_through += 1
        process.let_through += 1
        if process.let_through > BURST:
            most = BURST + RATE * (now - process.since)
            self._ledger.check(
                process.let_through <= most + 1e-6,
                f"an address space had {process.let_through} requests, allowed are {most:g}",
            )
        if sent.kind is Kind.IN_DEBT:
            assert process.in_debt_since is not None
            self._ledger.check(
                now - process.in_debt_since >= DEBT_SECONDS,
                "an address space had a request while it owed bytes",
            )

    def _asked(self, lane: _Lane, ask: _Ask, reply: Reply) -> None:
        kind = ask.kind
        if reply is Reply.WAIT and kind in RETRIED:
            self._ask_later(lane, ask)
            if kind is Kind.ECHO and not ask.echoed:
                ask.echoed = True
                other = _Ask(kind, ask.values, ask.process)
                other.echoed = True
                self._ask_later(lane, other, elsewhere=True)
            return
        if reply not in (Reply.WAIT, Reply.DENIED):
            self._ledger.ends[kind] += 1
        # Denied, it gives up.
        if kind is Kind.SLOW_READ:
            self._ask_slots.append(ask.values[0])

    def _ask_later(self, lane: _Lane, ask: _Ask, *, elsewhere: bool = False) -> None:
        way = ask.values[1]
        if elsewhere or way >> 4 & 3 == 0:
            lane = self.lanes[(lane.number + 1) % self._planned_lanes]
        # Once it was late, it hurries: else a result that expires each time is never collected.
        due = lane.steps + (0 if ask.retried else RETRY_AFTER[way % len(RETRY_AFTER)])
        ask.retried = True
        heappush(lane.again, (due, next(self._ties), ask))
        self._feed_soon(lane)

    # Its memory.

    async def read_physical(self, event, address, size):
        self._check_that_it_stands_still(event)
        if address == BROKEN:
            raise BackendError("the VM does not say")
        if address == STUCK:
            await anyio.sleep_forever()
        if address == HUGE:
            return self._huge
        if DELAYED <= address < DELAYED + MEMORY:
            await anyio.sleep(DELAY)
            self._check_that_it_stands_still(event)
            address -= DELAYED
        if address + size > MEMORY:
            raise GuestMemoryError(address, "not mapped")
        return bytes(self._memory[address : address + size])

    async def write_physical(self, event, address, data):
        self._check_that_it_stands_still(event)
        if address + len(data) > MEMORY:
            raise GuestMemoryError(address, "not mapped")
        self._memory[address : address + len(data)] = data

    def _check_that_it_stands_still(self, event) -> None:
        opened = self.lanes[event.vcpu].open
        if not opened or opened[0].seq != event.seq or opened[0].answered:
            self._ledger.wrong(f"memory is accessed for trap {event.seq}, which is not at hand")

    def oldest(self) -> str:
        """What has been open for longest, for people."""
        first = sorted((lane.open[0] for lane in self.lanes if lane.open), key=lambda s: s.seq)
        return ", ".join(f"{sent.kind.name} ({sent.seq})" for sent in first[:10])


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
            max_address_spaces=MOST_SPACES,
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
            if stalled or self.ledger.wrongs > MOST_WRONGS:
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


# --- the command ------------------------------------------------------------------------


class Progress:
    """One line on standard error: rewritten at a terminal, else a new one every few seconds."""

    EVERY = 5.0

    def __init__(self, traps: int) -> None:
        self._traps = traps
        self._started = self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, answered: int) -> None:
        now = time.monotonic()
        if not self._terminal and now - self._told < self.EVERY:
            return
        self._told = now
        rate = answered / max(now - self._started, 1e-9)
        line = (
            f"{answered:>11,} traps, planned {self._traps:,} and their retries; "
            f"{rate:,.0f}/s, {resident():.0f} MiB"
        )
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")


def as_table(report: Report) -> str:
    """The report for people."""
    lines = [f"{'kind':<16} {'sent':>10}  outcomes"]
    for name, counts in report.kinds.items():
        told = ", ".join(f"{n:,} {outcome}" for outcome, n in counts.items() if outcome != "sent")
        lines.append(f"{name:<16} {counts['sent']:>10,}  {told or 'ran natively'}")
    lines += ["", f"{'outcome':<16} {'traps':>10}"]
    lines += [f"{name:<16} {count:>10,}" for name, count in report.outcomes.items()]
    lines += [
        "",
        f"{'loop':<16} {report.loop:>10}",
        f"{'lanes':<16} {report.lanes:>10,}",
        f"{'seed':<16} {report.seed:>10}",
        f"{'traps':<16} {report.traps:>10,}",
        f"{'retries':<16} {report.retries:>10,}",
        f"{'uncollected':<16} {report.uncollected:>10,}",
        f"{'seconds':<16} {report.seconds:>10.1f}",
        f"{'traps/s':<16} {report.traps_per_second:>10,.0f}",
        f"{'longest hang':<16} {report.longest_hang * 1000:>10.0f} ms of {HARD * 1000:.0f}",
        f"{'most tasks':<16} {report.most_tasks:>10,}",
        f"{'RSS, first half':<16} {report.first_half:>10.1f} MiB",
        f"{'RSS, second half':<16} {report.second_half:>10.1f} MiB",
        "",
        *[f"WRONG: {what}" for what in report.first_wrongs],
        f"{report.wrongs:,} wrong" if report.wrongs else "all as it has to be",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--traps", type=int, default=1_000_000, help="that are planned")
    parser.add_argument("--lanes", type=int, default=64, help="vCPUs that send them")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--seed", type=int, default=1, help="fixes what is sent")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    if not 1 <= args.lanes <= 1024 or args.traps < 1:
        parser.error("--lanes takes 1 to 1024, --traps at least 1")
    warnings.simplefilter("error")
    progress = Progress(args.traps)
    soak = Soak(args.traps, args.lanes, args.seed, args.loop, progress)
    threads = threading.active_count()
    report: Report = anyio.run(soak.run, **LOOPS[args.loop])
    progress.end()
    if threading.active_count() > threads:
        report = report._replace(
            wrongs=report.wrongs + 1, first_wrongs=[*report.first_wrongs, "a thread is left"]
        )
    told = json.dumps(report._asdict(), indent=2) if args.json else as_table(report)
    sys.stdout.write(f"{told}\n")
    return 1 if report.wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
