"""The fault soak: the kinds of traps, how many there are of each, and what each calls for."""

from enum import Enum, IntEnum
from typing import NamedTuple

from vmibridge import (
    OutcomeKind,
)

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

MAX_WRONGS = 100
"""It gives up after so many, too."""

DEPTH = 3
"""Traps that a lane has open at a time; a vCPU has one, but the order is promised for more."""

# The quotas, and how much of them is used: see `Process`.
BURST, RATE = 16, 32.0
PROCESS_USES = 8
DEBT = 4 << 20
BYTES_BURST, BYTES_RATE = 64 << 10, 512 << 10
DEBT_SECONDS = (DEBT - BYTES_BURST) / BYTES_RATE
MAX_SPACES = 8192
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
