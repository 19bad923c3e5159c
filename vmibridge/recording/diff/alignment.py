"""Which request of one recording is which of another, of one vCPU.

Both are walked side by side. Where they part, the next place where they meet again is looked for in
a window: what is between is only in the one, or only in the other; as many in both are the same
requests with other values. Where they do not meet in the window, they are compared as they stand.
The time is that of the walk, whatever the recordings have: a search that fails is paid for by the
requests that it was over.
"""

from array import array
from collections.abc import Iterator
from typing import TypeAlias

__all__ = ["WINDOW", "Pair", "aligned"]

WINDOW = 128
"""Requests to each side in which two recordings are to meet again."""
Pair: TypeAlias = tuple[int | None, int | None]
"""Places in the one and in the other; `None`: it is only in one."""


def aligned(one: "array[int]", other: "array[int]") -> Iterator[Pair]:
    """Pairs of two rows of keys, in order."""
    at, to = 0, 0
    while at < len(one) and to < len(other):
        if one[at] == other[to]:
            yield at, to
            at, to = at + 1, to + 1
            continue
        left, right = _meet(one, at, other, to)
        common = left if left == right else 0
        for step in range(common):
            yield at + step, to + step
        for step in range(common, left):
            yield at + step, None
        for step in range(common, right):
            yield None, to + step
        at, to = at + left, to + right
    for place in range(at, len(one)):
        yield place, None
    for place in range(to, len(other)):
        yield None, place


def _meet(one: "array[int]", at: int, other: "array[int]", to: int) -> tuple[int, int]:
    """How many to skip in each until they are the same; the fewest in all."""
    left_end, right_end = min(WINDOW, len(one) - at), min(WINDOW, len(other) - to)
    first: dict[int, int] = {}
    for right in range(right_end - 1, -1, -1):
        first[other[to + right]] = right
    best: tuple[int, int] | None = None
    for left in range(left_end):
        if best is not None and left >= sum(best):
            break
        right = first.get(one[at + left], -1)
        if right < 0 or (best is not None and left + right >= sum(best)):
            continue
        best = left, right
    if best is not None:
        return best
    # Not one is in the other's window: they stand for each other as far as both go.
    both = min(left_end, right_end)
    return both, both
