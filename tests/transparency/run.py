"""Generated programs by hand: `cd tests && python -m transparency.run --backend unicorn`."""

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio

from transparency.gdb_machine import GdbMachine
from transparency.kvm_machine import KvmMachine, af_of_shifts
from transparency.profiles import (
    BY_BREAKPOINTS,
    BY_BREAKPOINTS_OF_7_2,
    BY_KVM,
    BY_PLUGIN_API_ALONE,
    EVERYTHING,
    NO_EXCEPTIONS,
    Profile,
)
from transparency.qemu_machine import PluginMachine
from transparency.search import Found, Machine, find
from transparency.unicorn_machine import UnicornMachine
from vmibridge.backends.qemu.plugin.build import build_plugin

_QEMU = Path(__file__).parents[2] / ".qemu/qemu-system-x86_64"


def main() -> None:
    """Exits with 1 when programs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("unicorn", "plugin", "gdb", "kvm"), default="unicorn")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--until", type=int, default=5, help="stop after so many that differ")
    parser.add_argument("--quiet", action="store_true", help="figures only, nothing is shrunk")
    parser.add_argument("--qemu", default=str(_QEMU))
    parser.add_argument("--api-alone", action="store_true", help="the plugin with inside=off")
    parser.add_argument("--old", action="store_true", help="that QEMU is older than 11")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machine, profile = _machine(given, Path(folder))
        seeds = range(given.seed, given.seed + given.count)

        async def run() -> Found:
            return await find(
                machine, profile, seeds, until=given.until, shrinks=not given.quiet, say=_say
            )

        sys.exit(bool(anyio.run(run).reports))


def _machine(given: argparse.Namespace, folder: Path) -> tuple[Machine, Profile]:
    if given.backend == "plugin":
        plugin = build_plugin(folder / "vmibridge-plugin.so")
        if given.api_alone:
            return partial(PluginMachine, given.qemu, plugin, ",inside=off"), BY_PLUGIN_API_ALONE
        return partial(PluginMachine, given.qemu, plugin), EVERYTHING
    if given.backend == "gdb":
        profile = BY_BREAKPOINTS_OF_7_2 if given.old else BY_BREAKPOINTS
        return partial(GdbMachine, given.qemu), profile
    if given.backend == "kvm":
        return KvmMachine, replace(BY_KVM, af_of_shifts=af_of_shifts())
    return UnicornMachine, NO_EXCEPTIONS


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
