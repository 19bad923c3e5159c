"""The life of a request: its states, and the one table of its transitions.

Theory of operation
===================

A request begins when a worker takes a trap off its lane. It ends when it can be given to no
trap any more. In between it may lose its trap (the guest was told to wait), and get another one
(the guest asked again). The engine is made of four parts that act on it, all on one event loop:

- A *worker* (`workers`) takes the trap and runs the handler inline, inside its own task, or hands
  the request over to a task of its own, which is its worker from there on.
- The *watchdog* (`deadlines`) acts when a deadline has passed. It is armed when the handler is
  suspended for the first time, and not before: nothing can interrupt a handler that does not
  wait, so most requests never meet it.
- The *retries* (`retries`) are asked at each new trap whether it is one of theirs.
- The *shutdown* (`deadlines`, too) acts when the server stops, or the VM or a vCPU of it is gone.

::

    TAKEN --> INLINE --> RUNNING --> PARKED <--> RETRIED          a handler runs
                ^           ^           |
                v           |           v
            ENTERING --> QUEUED        KEPT                       none has begun; it has ended

| state | the request | trap | worker | deadlines |
|---|---|---|---|---|
| `TAKEN` | was taken off its lane; no handler was asked | its own | yes | |
| `INLINE` | runs its handler, which has not waited so far | its own | yes | |
| `ENTERING` | asks for a turn or a place, and has not waited so far | its own | yes | |
| `QUEUED` | waits for its turn or a place | its own | yes | soft, hard |
| `RUNNING` | has a handler that waits for something | its own | yes | soft, hard |
| `PARKED` | was told to wait; its handler goes on without a trap | | yes | hard |
| `RETRIED` | has a trap again: the guest has asked again | a retry | yes | soft, hard |
| `KEPT` | has a result that waits for a retry | | | expiry |
| `ANSWERED` | is over: its worker answers it | | | |
| `OVERTAKEN` | is over: it is answered in the place of its worker | | | |
| `JOINED` | is over: its trap was a retry, and is with the request that it asks for | | | |
| `COLLECTED` | is over: a retry took the result | | | |
| `DROPPED` | is over: no retry came for the result | | | |
| `ABANDONED` | is over: its handler was cancelled, and no trap waited for it | | | |

`PARKED`, `RETRIED` and `KEPT` together are *pending*: a retry can find the request.

| cause | who | when |
|---|---|---|
| `ASK` | worker | it calls the handler |
| `QUEUE` | worker | the handler is serial, or there may be no place |
| `BEGIN` | worker | turn and place are there |
| `SUSPEND` | worker | it is about to be suspended, for the first time |
| `END` | worker | the handler returned or raised |
| `ANSWER` | worker | it answers without asking a handler |
| `JOIN` | retries | the trap is a retry, and waits with the handler of its request |
| `RETRY` | retries | a retry has come for this request |
| `EXPIRE` | retries | the result is too old, or one too many, or the guest has ended |
| `SOFT_DEADLINE` | watchdog | the soft deadline has passed |
| `HARD_DEADLINE` | watchdog | the hard deadline has passed |
| `CANCEL` | shutdown | the server stops, or the vCPU or the guest is gone |

Which cause leads from which state to which stands in `TRANSITIONS`, once. A cause that a state
has no row for must not happen in it: `Request.on` raises.

Invariants
----------

- A trap is answered by the code that takes it out of the request (`Request.event`). Taking it out
  and changing the state are one step without a task switch. So a worker, the watchdog and the
  shutdown can never answer the same trap.
- A state in `HAS_TRAP` has a trap, a state in `HAS_WORKER` a worker that may be cancelled. No other
  state has them, but for `ANSWERED`: there the worker has both, and nothing else the request.
- The set of the watchdog holds exactly the requests in a state of `WATCHED`.
- When a worker comes out of its handler and the state is neither `INLINE` nor in `WATCHED`, it
  has been *overtaken*: whatever the handler came to is dropped, and the cancel scope of the
  worker is spent.
- What has not begun is never kept (`QUEUED` at its soft deadline is `OVERTAKEN`, by WAIT). Else a
  guest could pile up requests without end, since each WAIT frees its vCPU.
- A request that has begun is not queued again in the eyes of a guest: `RUNNING`, `PARKED` and
  `RETRIED` stay what they are while their next handler waits for its turn. They hold a place.
"""

import asyncio
from collections.abc import Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any

from vmibridge.aio.handler_scope import HandlerScope
from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.dispatch import Entry
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.settings import Terms
from vmibridge.vm.trap import TrapEvent


class State(Enum):
    """Where a request stands; see the module."""

    TAKEN = "taken"
    INLINE = "inline"
    ENTERING = "entering"
    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    RETRIED = "retried"
    KEPT = "kept"
    ANSWERED = "answered"
    OVERTAKEN = "overtaken"
    JOINED = "joined"
    COLLECTED = "collected"
    DROPPED = "dropped"
    ABANDONED = "abandoned"

    # Members are singletons, and the hash of an Enum is a function in Python.
    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__


class Cause(Enum):
    """What moves a request; see the module."""

    ASK = "ask"
    QUEUE = "queue"
    BEGIN = "begin"
    SUSPEND = "suspend"
    END = "end"
    ANSWER = "answer"
    JOIN = "join"
    RETRY = "retry"
    EXPIRE = "expire"
    SOFT_DEADLINE = "soft deadline"
    HARD_DEADLINE = "hard deadline"
    CANCEL = "cancel"

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__


TRANSITIONS: dict[State, dict[Cause, State]] = {
    State.TAKEN: {
        Cause.ASK: State.INLINE,
        Cause.QUEUE: State.ENTERING,
        # Not ours, denied, unmatched, or a retry that is answered at once.
        Cause.ANSWER: State.ANSWERED,
        Cause.JOIN: State.JOINED,
    },
    State.INLINE: {
        Cause.SUSPEND: State.RUNNING,
        # A dispatcher passed the request on without waiting; the next one may have turns.
        Cause.ASK: State.INLINE,
        Cause.QUEUE: State.ENTERING,
        Cause.END: State.ANSWERED,
    },
    State.ENTERING: {
        Cause.BEGIN: State.INLINE,
        Cause.SUSPEND: State.QUEUED,
        Cause.END: State.ANSWERED,
    },
    State.QUEUED: {
        Cause.BEGIN: State.RUNNING,
        # The server stops, and its own task has not begun.
        Cause.END: State.ANSWERED,
        Cause.SOFT_DEADLINE: State.OVERTAKEN,
        Cause.HARD_DEADLINE: State.OVERTAKEN,
        Cause.CANCEL: State.OVERTAKEN,
    },
    State.RUNNING: {
        # A dispatcher passed the request on after it had waited: it has begun, and would begin
        # again with the retry if the soft deadline found it in the queue.
        Cause.QUEUE: State.RUNNING,
        Cause.BEGIN: State.RUNNING,
        Cause.END: State.ANSWERED,
        Cause.SOFT_DEADLINE: State.PARKED,
        Cause.HARD_DEADLINE: State.OVERTAKEN,
        Cause.CANCEL: State.OVERTAKEN,
    },
    State.PARKED: {
        Cause.QUEUE: State.PARKED,
        Cause.BEGIN: State.PARKED,
        Cause.RETRY: State.RETRIED,
        Cause.END: State.KEPT,
        # The fallback is a result like any other: a retry gets it.
        Cause.HARD_DEADLINE: State.KEPT,
        Cause.CANCEL: State.ABANDONED,
    },
    State.RETRIED: {
        Cause.QUEUE: State.RETRIED,
        Cause.BEGIN: State.RETRIED,
        Cause.END: State.ANSWERED,
        # The soft deadline counts from each trap, so it passes as often as the guest asks.
        Cause.SOFT_DEADLINE: State.PARKED,
        Cause.HARD_DEADLINE: State.OVERTAKEN,
        Cause.CANCEL: State.OVERTAKEN,
    },
    State.KEPT: {
        Cause.RETRY: State.COLLECTED,
        Cause.EXPIRE: State.DROPPED,
    },
    State.ANSWERED: {},
    State.OVERTAKEN: {},
    State.JOINED: {},
    State.COLLECTED: {},
    State.DROPPED: {},
    State.ABANDONED: {},
}
"""The state that follows, by state and cause. The code runs on it (`Request.on`).

The states that most requests pass through are set without a look-up; `Request.on` names them.
`tests/unit/engine/test_trap_life.py` and the fault soak check those against the table, too.
"""

HAS_TRAP: frozenset[State] = frozenset(
    {
        State.TAKEN,
        State.INLINE,
        State.ENTERING,
        State.QUEUED,
        State.RUNNING,
        State.RETRIED,
    }
)
"""A vCPU stands still for it."""
WATCHED: frozenset[State] = frozenset({State.QUEUED, State.RUNNING, State.PARKED, State.RETRIED})
"""Its deadlines are armed."""
HAS_WORKER: frozenset[State] = HAS_TRAP | WATCHED
"""A worker is bound to it."""
PENDING: frozenset[State] = frozenset({State.PARKED, State.RETRIED, State.KEPT})
"""A retry can find it."""
DONE_BY_WORKER: frozenset[State] = frozenset({State.ANSWERED, State.JOINED})
"""Its own worker has brought it to its end, and nothing else refers to it."""
_OVERTAKEN: frozenset[State] = frozenset(State) - HAS_WORKER - DONE_BY_WORKER


class Worker:
    """A task that answers traps one after the other, and what it needs for the one it is at.

    Or the task of one request alone: see `workers`.
    """

    __slots__ = ("context", "has_place", "request", "retires", "scope", "task")

    task: "asyncio.Task[object] | None"
    """Its own, on asyncio: a handler may cancel it behind the engine's back."""
    scope: HandlerScope
    """What is cancelled to overtake it. A spent one is replaced, together with `request`."""
    request: "Request"
    context: BridgeContext
    """The guest, as the handler sees it."""
    retires: bool
    """A handler has waited in this task: it takes no other trap."""
    has_place: bool
    """It holds a place in flight until the handler has unwound, also if answered for before."""


class Request:
    """One request. Which of the attributes are set depends on the state.

    A worker uses the same object for its next trap as long as nothing else refers to it, which is
    when the old one ended in a state of `DONE_BY_WORKER`: to make one for each trap would be
    felt.
    """

    __slots__ = (
        "deadline",
        "entry",
        "event",
        "expires",
        "first",
        "first_seq",
        "hard_deadline",
        "key",
        "outcome",
        "packet",
        "started",
        "state",
        "terms",
        "worker",
    )

    state: State
    event: TrapEvent | None
    """The trap that waits for the answer; it is answered where it is taken out. See the module."""
    worker: Worker | None
    """It runs the handler; `None` once that does not matter to the request any more."""
    started: float
    """When that trap was taken."""
    packet: BridgePacket
    """What that trap asks."""
    first: Entry
    """Who was asked first; a request and its retry have it in common."""
    entry: Entry
    """Who was asked last."""

    # In WATCHED.
    terms: Terms
    deadline: float
    """The nearer one of its two."""
    hard_deadline: float

    # In PENDING.
    key: Hashable
    """What a retry has in common with it."""
    first_seq: int
    """The sequence number of the trap that it came with."""

    # In KEPT.
    outcome: Outcome[Any]
    expires: float

    def __init__(self, worker: Worker) -> None:
        # As if there had been one before: the worker takes its first trap next.
        self.state = State.ANSWERED
        self.event = None
        self.worker = worker

    def on(self, cause: Cause) -> State:
        """Make the transition of the table; returns the new state.

        What most requests pass through is set without it: `TAKEN`, `INLINE`, `ANSWERED`, and
        `RUNNING` at the first suspension. It would be one more call for each trap.

        Raises `RuntimeError` where the table has none: the engine is wrong, and to go on could
        answer a trap twice.
        """
        try:
            state = self.state = TRANSITIONS[self.state][cause]
        except KeyError:
            raise RuntimeError(f"{cause} in {self.state}") from None
        return state

    def take_trap(self) -> TrapEvent:
        """Take the trap out: the caller must answer it."""
        event, self.event = self.event, None
        assert event is not None
        return event

    def take_worker(self) -> Worker:
        """Take the worker off: it is overtaken, or done."""
        worker, self.worker = self.worker, None
        assert worker is not None
        return worker

    @property
    def is_overtaken(self) -> bool:
        """Whether its worker has nothing more to answer: for that worker, while it unwinds."""
        return self.state in _OVERTAKEN

    @property
    def retry_of(self) -> int | None:
        """The sequence number that the outcome of a retry has; `None` before any."""
        return self.first_seq if self.state in PENDING else None


def first_trap(request: Request, worker: Worker) -> int:
    """The sequence number of the trap that a request came with, which its worker still runs.

    Of one that was overtaken as `RETRIED` that of its last trap.
    """
    return request.first_seq if request.state in PENDING else worker.context.event.seq
