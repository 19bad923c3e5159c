"""Watch the states of all requests of the engine: each change is checked against its table.

The engine looks a transition up in the table itself, except on its hot path. Here every change of
`Request.state` is seen, also where the code sets it by itself, and the invariants of each state are
checked.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vmibridge.engine.request import (
    DONE_BY_WORKER,
    HAS_TRAP,
    HAS_WORKER,
    PENDING,
    TRANSITIONS,
    Request,
    State,
)

EDGES = {(old, new) for old, follow in TRANSITIONS.items() for new in follow.values()}
"""The transitions of the table, without their causes."""


class WatchedStates:
    """The transitions that happened, how often, and what was wrong about them."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[State, State]] = Counter()
        self.wrong: list[str] = []

    def changes(self, request: Request, old: State | None, new: State) -> None:
        if old is None:
            if new is not State.ANSWERED:
                self.wrong.append(f"a request is new, and {new}")
            return
        if new is State.TAKEN:
            # The worker begins the next request in the same object.
            if old not in DONE_BY_WORKER:
                self.wrong.append(f"taken again, and {old}")
            if request.event is None or request.worker is None:
                self.wrong.append("taken without a trap or a worker")
            return
        self.seen[old, new] += 1
        if (old, new) not in EDGES:
            self.wrong.append(f"{old} to {new} is not in the table")
        if old in HAS_TRAP and request.event is None:
            self.wrong.append(f"{old}, and has no trap")
        if old not in HAS_TRAP and request.event is not None:
            self.wrong.append(f"{old}, and has a trap")
        if (old in HAS_WORKER) != (request.worker is not None):
            self.wrong.append(f"{old}, and its worker is {request.worker}")
        if old in PENDING and not hasattr(request, "key"):
            self.wrong.append(f"{old}, and has no key")

    def check(self) -> None:
        assert self.wrong == []
        assert self.seen, "no request was seen"


@contextmanager
def watched_states() -> Iterator[WatchedStates]:
    """Watch every request, from here to the end of the block."""
    watched = WatchedStates()
    slot = Request.__dict__["state"]

    def change(request: Request, new: State) -> None:
        old = slot.__get__(request) if hasattr(request, "event") else None
        watched.changes(request, old, new)
        slot.__set__(request, new)

    Request.state = property(slot.__get__, change)
    try:
        yield watched
    finally:
        Request.state = slot
