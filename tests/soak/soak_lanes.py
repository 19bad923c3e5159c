"""The fault soak: what the guest keeps of its lanes, its address spaces, and what is under way."""

import itertools
from collections import deque
from collections.abc import Iterator
from random import Random

from soak_kinds import HAMMER_LENGTH, KINDS, Kind

# --- the guest --------------------------------------------------------------------------


class Process:
    """An address space, with a CR3 that is made up, and what the quota has to make of it."""

    __slots__ = ("fed", "in_debt_since", "let_through", "root", "since")

    def __init__(self, root: int) -> None:
        self.root = root
        self.fed = 0
        self.let_through = 0
        self.since = 0.0
        self.in_debt_since: float | None = None


class Ask:
    """A request that may be told to wait, and is then asked again."""

    __slots__ = ("echoed", "kind", "process", "retried", "seqs", "values")

    def __init__(self, kind: Kind, values: tuple[int, int, int, int], process: Process) -> None:
        self.kind = kind
        self.values = values
        self.process = process
        self.seqs: set[int] = set()
        self.echoed = False
        self.retried = False


class Sent:
    """A trap that is open."""

    __slots__ = ("answered", "ask", "expected", "kind", "nth", "process", "seq", "slot")

    def __init__(self, seq: int, kind: Kind, process: Process) -> None:
        self.seq = seq
        self.kind = kind
        self.process = process
        self.nth = process.fed
        self.ask: Ask | None = None
        self.expected = 0
        self.slot = 0
        self.answered = False


class Lane:
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
        self.open: deque[Sent] = deque()
        self.again: list[tuple[int, int, Ask]] = []
        self.steps = 0
        self.process: Process | None = None
        self.uses_left = 0
        self.hammers = False
        self.debtor: Process | None = None
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
