"""The life of a trap: what a guest may ask and on what terms, what comes of it, and what is seen of
it.

`test_trap_life` is the machine that plays it.
"""

import math
from collections import deque
from enum import Enum
from typing import NamedTuple

import anyio
import anyio.lowlevel

from vmibridge import (
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
)

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
