"""The fault soak: what happened, counted, and what was wrong."""

import logging
from collections import Counter

from soak_kinds import Kind, Reply

from vmibridge import (
    OutcomeKind,
)

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
