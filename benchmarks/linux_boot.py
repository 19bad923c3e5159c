"""How long a Linux guest boots with the plugin armed, against a boot without the plugin.

    python benchmarks/linux_boot.py [--rounds N] [--json]

A round has two boots of each side: in turn, and then in the opposite order. A boot is from the
start of QEMU to its end: the guest comes up, and goes down without having asked for anything.

- *plain*: QEMU without the plugin.
- *armed*: QEMU with the plugin, and a host that listens, has a handler with a magic, and traps
  CPUID, VMCALL and VMMCALL. It is this process.
- *empty*: QEMU with a plugin that is called for each block of translated code, and does nothing:
  what QEMU itself takes for any plugin that looks at code.

All of it is pinned to one core. *busy* is the processor time of QEMU. Needs `make qemu` and
`make linux`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from common import Add, pin

from vmibridge import BridgeServer, open_backend
from vmibridge.backends.qemu.plugin.build import build_plugin

ROOT = Path(__file__).resolve().parents[1]
LINUX = ROOT / ".linux"
QEMU = os.environ.get("VMIBRIDGE_QEMU", str(ROOT / ".qemu/qemu-system-x86_64"))
SIDES = ("plain", "armed", "empty")
BAR = 1.05
EMPTY = """
#include <stdint.h>
int qemu_plugin_version __attribute__((visibility("default"))) = 7;
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(void *, void *), void *);
static void on_translation(void *block, void *unused) { (void)block; (void)unused; }
__attribute__((visibility("default")))
int qemu_plugin_install(uint64_t id, const void *info, int count, char **arguments)
{
    (void)info; (void)count; (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, 0);
    return 0;
}
"""


def command(*extra: str) -> list[str]:
    options = "-accel tcg -M pc -m 256 -nodefaults -display none -no-reboot -serial stdio"
    return [
        *(QEMU, *options.split(), *extra),
        *("-kernel", str(LINUX / "vmlinuz"), "-initrd", str(LINUX / "initrd")),
        *("-append", "console=ttyS0 quiet panic=-1 no_timer_check"),
    ]


async def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds that a boot takes, and seconds of the processor."""
    busy = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = await anyio.run_process(arguments)
    taken = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert b"vmibridge: all right" in done.stdout
    return taken, after.ru_utime + after.ru_stime - busy.ru_utime - busy.ru_stime


async def armed(plugin: Path, socket: Path) -> tuple[float, float]:
    async with open_backend(f"qemu-plugin:unix:{socket}") as backend:
        server = BridgeServer(backend, Add())

        async def serve() -> None:
            async for outcome in server.run():
                raise AssertionError(f"nothing is ours in a boot, but {outcome}")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            taken = await timed(command("-plugin", f"file={plugin},socket={socket}"))
    assert [end.reason for end in server.summary.guest.vcpus] == ["halted"], "no plugin was there"
    return taken


async def measure(
    rounds: int, plugin: Path, empty: Path, socket: Path
) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for side in (*SIDES, *reversed(SIDES)) * rounds:
        if side == "armed":
            taken = await armed(plugin, socket)
        else:
            taken = await timed(command(*(("-plugin", str(empty)) if side == "empty" else ())))
        found[side].append(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    subprocess.run([ROOT / "guest/linux/build-guest"], check=True, stdout=sys.stderr)
    pin()
    with tempfile.TemporaryDirectory() as folder:
        plugin = build_plugin(Path(folder, "vmibridge-plugin.so"))
        source, empty = Path(folder, "empty.c"), Path(folder, "empty.so")
        source.write_text(EMPTY)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", source, "-o", empty], check=True)
        found = anyio.run(measure, options.rounds, plugin, empty, Path(folder, "socket"))
    line: dict[str, float] = {"bar": BAR}
    for side, each in found.items():
        line[f"{side}_s"] = statistics.median(taken for taken, _ in each)
        line[f"{side}_busy_s"] = statistics.median(busy for _, busy in each)
        line[f"{side}_ratio"] = line[f"{side}_s"] / line["plain_s"]
        line[f"{side}_busy_ratio"] = line[f"{side}_busy_s"] / line["plain_busy_s"]
    if options.json:
        print(json.dumps(line))
        return
    print(f"Linux boot, medians of {2 * options.rounds} boots of each side; armed is to have {BAR}")
    print("side   seconds ratio   busy ratio")
    for side in SIDES:
        columns = (line[f"{side}{name}"] for name in ("_s", "_ratio", "_busy_s", "_busy_ratio"))
        print("{:6} {:7.3f} {:5.3f} {:6.3f} {:5.3f}".format(side, *columns))


if __name__ == "__main__":
    main()
