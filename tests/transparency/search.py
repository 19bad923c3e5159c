"""Programs one after the other on a machine, until some differ."""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from transparency.generator import generate
from transparency.kinds import kinds_of
from transparency.profiles import Profile
from transparency.program import Linked
from transparency.shrink import shrink

Machine = Callable[[], AbstractAsyncContextManager[Any]]
_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Found:
    """What a search has found."""

    programs: int = 0
    reports: dict[int, str] = field(default_factory=dict)
    """The seed of each program that differs, and what people have to know of it."""
    first: dict[str, int] = field(default_factory=dict)
    """After how many programs a kind of fault was found."""


def report(linked: Linked, differences: list[str]) -> str:
    """The program as assembly, and what is different."""
    return "\n".join([linked.listing(), *(f"  {difference}" for difference in differences)])


async def find(
    machine: Machine,
    profile: Profile,
    seeds: range,
    *,
    until: int,
    shrinks: bool = True,
    say: Callable[[str], object] = lambda _line: None,
) -> Found:
    """Run the programs of `seeds`, to the last one or until so many differ."""
    found = Found()
    began = said = time.monotonic()
    async with machine() as vm:
        for seed in seeds:
            linked = generate(seed, profile)
            differences = await vm.run(linked)
            found.programs += 1
            if differences:
                for kind in kinds_of(linked, differences) - found.first.keys():
                    found.first[kind] = found.programs
                    say(f"{kind}: first in program {found.programs}, seed {seed}")
                if shrinks:
                    linked, differences = await shrink(linked, differences, vm.run, profile)
                    say(report(linked, differences))
                found.reports[seed] = report(linked, differences)
            is_last = found.programs == len(seeds) or len(found.reports) >= until
            if time.monotonic() - said > _EVERY or is_last:
                said = time.monotonic()
                rate = found.programs / (said - began)
                say(f"{found.programs} programs, {len(found.reports)} differ, {rate:.0f}/s")
            if is_last:
                break
    return found
