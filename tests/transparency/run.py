"""Run generated programs by hand: python tests/transparency/run.py --backend unicorn --count 1000."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from transparency.gdb_machine import GdbMachine
from transparency.generator import (
    BY_BREAKPOINTS,
    BY_BREAKPOINTS_OF_7_2,
    EVERYTHING,
    NO_EXCEPTIONS,
    Profile,
    generate,
)
from transparency.kinds import kinds_of
from transparency.program import Linked
from transparency.qemu_machine import PluginMachine
from transparency.shrink import shrink
from transparency.unicorn_machine import UnicornMachine
from vmibridge.backend.qemu_plugin.build import build_plugin

Machine = Callable[[], AbstractAsyncContextManager[Any]]


def report(linked: Linked, differences: list[str]) -> str:
    """For people: the program, and what is different."""
    return "\n".join([linked.listing(), *(f"  {difference}" for difference in differences)])


async def find(
    machine: Machine,
    profile: Profile,
    seeds: range,
    *,
    until: int,
    shrinks: bool = True,
    quiet: bool = False,
) -> dict[int, str]:
    """The programs with differences, until there are so many: their reports by seed."""
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    began = shown = time.monotonic()
    async with machine() as vm:
        for number, seed in enumerate(seeds, 1):
            linked = generate(seed, profile)
            differences = await vm.run(linked)
            if differences:
                for kind in kinds_of(linked, differences):
                    if first.setdefault(kind, number) == number:
                        print(f"{kind}: first in program {number}, seed {seed}", flush=True)
                if shrinks:
                    linked, differences = await shrink(linked, differences, vm.run, profile)
                found[seed] = report(linked, differences)
                if not quiet:
                    print(f"{found[seed]}\n", flush=True)
            now = time.monotonic()
            if now - shown > 10 or number == len(seeds) or len(found) >= until:
                shown = now
                rate = number / (now - began)
                print(f"{number} programs, {len(found)} differ, {rate:.0f}/s", flush=True)
            if len(found) >= until:
                break
    return found


def _machine(backend: str, qemu: str, *, is_old: bool) -> tuple[Machine, Profile]:
    if backend == "plugin":
        plugin = build_plugin(Path(tempfile.mkdtemp()) / "vmibridge-plugin.so")
        return lambda: PluginMachine(qemu, plugin), EVERYTHING
    if backend == "gdb":
        return lambda: GdbMachine(qemu), BY_BREAKPOINTS_OF_7_2 if is_old else BY_BREAKPOINTS
    return UnicornMachine, NO_EXCEPTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("unicorn", "plugin", "gdb"), default="unicorn")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--until", type=int, default=5, help="stop after so many that differ")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--old", action="store_true", help="QEMU is older than 11")
    parser.add_argument("--quiet", action="store_true", help="only figures")
    parser.add_argument("--qemu", default=str(ROOT / ".qemu/qemu-system-x86_64"))
    given = parser.parse_args()
    machine, profile = _machine(given.backend, given.qemu, is_old=given.old)
    seeds = range(given.seed, given.seed + given.count)

    async def run() -> dict[int, str]:
        return await find(machine, profile, seeds, until=given.until, shrinks=not given.no_shrink)

    sys.exit(bool(anyio.run(run)))


if __name__ == "__main__":
    main()
