"""Counts and latencies of any number of traps, in a bounded space.

A latency is counted in a bucket of 1/32 octave, so that a quantile is off by 2.2 % at most.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

from vmibridge.recording.traps import RecordedTrap, outcome_word

BUCKETS = 32
"""Of one octave."""
MAX_EXACT = 1 << 53
"""Nanoseconds that a duration is cut to: 104 days, and a whole number in JavaScript."""
_MAX_GROUPS = 500
_MAX_NAME = 100


class Latency:
    """How long traps took, in nanoseconds."""

    __slots__ = ("buckets", "count", "longest", "shortest")

    def __init__(self) -> None:
        self.buckets: Counter[int] = Counter()
        self.count: int = 0
        self.shortest: int = MAX_EXACT
        self.longest: int = 0

    def add(self, nanoseconds: int) -> None:
        """Count one."""
        self.buckets[int(math.log2(nanoseconds) * BUCKETS) if nanoseconds > 1 else 0] += 1
        self.count += 1
        self.shortest = min(self.shortest, nanoseconds)
        self.longest = max(self.longest, nanoseconds)

    def merge(self, other: "Latency") -> None:
        """Count what another one has counted."""
        self.buckets.update(other.buckets)
        self.count += other.count
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)

    def quantile(self, permille: int) -> int:
        """What so many of 1,000 traps did not exceed; 0 where there are none."""
        rank = max(1, -(-self.count * permille // 1000))
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank <= 0:
                middle = round(2 ** ((bucket + 0.5) / BUCKETS))
                return min(max(middle, self.shortest), self.longest)
        return 0


class Key(NamedTuple):
    """What traps are counted together by."""

    handler: str | None
    """Where none matched: counted by request."""
    request: int | None
    """`None`: no packet could be read, or one of too many."""
    method: int | None


OTHERS = Key("(others)", None, None)


class Group:
    """The traps of one key."""

    __slots__ = ("latency", "outcomes")

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.latency: Latency = Latency()


class Statistics:
    """Of all traps that were added."""

    def __init__(self) -> None:
        self.groups: dict[Key, Group] = {}

    def add(self, trap: RecordedTrap) -> None:
        """Count a trap."""
        key = key_of(trap)
        group = self.groups.get(key)
        if group is None:
            if len(self.groups) >= _MAX_GROUPS:
                key = OTHERS
            group = self.groups.setdefault(key, Group())
        group.outcomes[outcome_word(trap)] += 1
        if trap.reply is not None:
            group.latency.add(nanoseconds(trap.reply.duration))

    @property
    def outcomes(self) -> Counter[str]:
        """Traps by outcome; "none" for those without a reply."""
        return sum((group.outcomes for group in self.groups.values()), Counter())

    def as_dict(self) -> dict[str, Any]:
        """What the page is given."""
        whole, handlers = Latency(), dict[str, Latency]()
        groups = sorted(self.groups.items(), key=lambda each: -each[1].outcomes.total())
        for key, group in groups:
            whole.merge(group.latency)
            handlers.setdefault(label_of(key), Latency()).merge(group.latency)
        return {
            "outcomes": self.outcomes,
            "groups": [
                {
                    "label": label_of(key),
                    "handler": key.handler,
                    "request": key.request,
                    "method": key.method,
                    "outcomes": group.outcomes,
                    "p50": group.latency.quantile(500),
                    "p99": group.latency.quantile(990),
                    "max": group.latency.longest,
                }
                for key, group in groups
            ],
            "latencies": [
                _latency_facts("all traps", whole),
                *(_latency_facts(label, latency) for label, latency in handlers.items()),
            ],
        }


def key_of(trap: RecordedTrap) -> Key:
    """What a trap is counted by."""
    packet, reply = trap.packet, trap.reply
    handler = None if reply is None or reply.handler is None else reply.handler[:_MAX_NAME]
    if packet is None:
        return Key(handler, None, None)
    return Key(handler, packet.request, packet.method)


def label_of(key: Key) -> str:
    """The handler, or what stands for it where none matched."""
    if key.handler is not None:
        return key.handler
    return "no packet" if key.request is None else f"{key.request:#06x}"


def nanoseconds(seconds: float) -> int:
    """A duration of a recording, which may hold any number, as one that makes sense."""
    if not seconds > 0:
        return 0
    return MAX_EXACT if seconds >= MAX_EXACT / 1e9 else round(seconds * 1e9)


def _latency_facts(label: str, latency: Latency) -> dict[str, Any]:
    return {
        "label": label,
        "count": latency.count,
        "buckets": sorted(latency.buckets.items()),
        "p50": latency.quantile(500),
        "p90": latency.quantile(900),
        "p99": latency.quantile(990),
        "p99.9": latency.quantile(999),
        "max": latency.longest,
    }
