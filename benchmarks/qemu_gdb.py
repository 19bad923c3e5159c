"""Traps a second through a QEMU's gdbstub and the whole engine, against gdb's own Python.

    python benchmarks/qemu_gdb.py [--events N] [--rounds N] [--json] [QEMU ...]

A small guest makes calls by VMCALL in 64-bit mode and checks every answer. Two sides take their
turns with each QEMU, under TCG:

- *engine*: `BridgeServer` over the backend `qemu-gdb`, iterated to the end, with one site.
- *gdb*: what one writes by hand: gdb, with a breakpoint whose `stop` reads the registers,
  computes the same answer, sets it and goes on.

What counts is the time from the first trap to the last. This process and its children are
pinned to one core. It needs gdb and nasm; the QEMUs are the system's and that of `make qemu`,
where they are there.
"""

import argparse
import os
import re
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import (
    ALL_RIGHT,
    LOOPS,
    ROOT,
    Figures,
    Invert,
    Loop,
    assemble,
    measured,
    options_of,
    pin,
    qemu_command,
    report,
    run,
)

from vmibridge import Bridge, BridgeServer, open_backend

VMCALL = 2

BY_HAND = """
import os, time
import gdb

gdb.execute("set pagination off")
gdb.execute("set confirm off")
gdb.execute("set architecture i386:x86-64")
gdb.execute("target remote " + os.environ["STUB"], to_string=True)
SITE = int(os.environ["SITE"], 16)
MASK = (1 << 64) - 1
events = 0
begin = 0.0


class Site(gdb.Breakpoint):
    def stop(self):
        global events, begin
        begin = begin or time.perf_counter()
        frame = gdb.selected_frame()
        rcx, rdx, r8, rip = (
            int(frame.read_register(name)) & MASK for name in ("rcx", "rdx", "r8", "rip")
        )
        if rcx & 0xFFFFFFFF != 0x42494D56 or rdx & 0xFFFF != 0x0100:
            return True
        answer = {
            "rax": ~r8 & MASK, "rcx": 0x213353522D494D56, "rdx": 0x213453522D494D56, "rip": rip + 3
        }
        for name, value in answer.items():
            gdb.execute("set $%s=%d" % (name, value))
        events += 1
        return False


Site("*%#x" % SITE)
try:
    gdb.execute("continue", to_string=True)
except gdb.error:
    pass
print("events", events, "seconds", time.perf_counter() - begin)
"""


@contextmanager
def guest(qemu: str, image: Path, stub: Path, accel: str = "tcg") -> Iterator[int]:
    """QEMU's process id, with the guest stopped at its begin; it has to end well."""
    stub.unlink(missing_ok=True)
    command = [*qemu_command(qemu, image, accel), "-S", "-gdb", f"unix:{stub},server=on,wait=off"]
    with subprocess.Popen(command) as process:
        try:
            while not stub.exists():
                time.sleep(0.01)
            yield process.pid
            status = process.wait(30)
            assert status == ALL_RIGHT, f"the guest was not answered as it should be: {status}"
        finally:
            process.kill()


def site_of(image: Path) -> int:
    """Where the guest's VMCALL is: in the table behind the header, site_cpuid, site_vmcall, ..."""
    site: int = struct.unpack_from("<Q", image.read_bytes(), 40)[0]
    return site


async def engine(stub: Path, site: int, events: int, pid: int) -> Figures:
    async with open_backend(f"qemu-gdb:unix:{stub}?site={site:#x}") as backend:
        server = BridgeServer(backend, Bridge(Invert()), timeout=60.0)
        return await measured(server, events, pid)


def by_hand(stub: Path, site: int, events: int, script: Path) -> float:
    """Events a second."""
    script.write_text(BY_HAND)
    printed = subprocess.run(
        ["gdb", "-nx", "-batch", "-x", str(script)],
        env=os.environ | {"STUB": str(stub), "SITE": hex(site)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"events (\d+) seconds ([\d.]+)", printed)
    assert found is not None, printed
    assert int(found[1]) == events, printed
    return events / float(found[2])


def version(qemu: str) -> str:
    printed = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"version ([\d.]+)", printed)[1]


def main() -> None:
    parser = options_of(__doc__, events=10_000, rounds=5)
    parser.add_argument("qemu", nargs="*")
    options = parser.parse_args()
    pin()
    known = (shutil.which("qemu-system-x86_64"), str(ROOT / ".qemu/qemu-system-x86_64"))
    qemus = options.qemu or [path for path in known if path and Path(path).exists()]
    if not options.json:
        print(f"{options.events} traps, median of {options.rounds} rounds, traps a second")
        print(f"{'QEMU':8} {'loop':8} {'engine':>7} {'gdb':>6} ratio")
    with tempfile.TemporaryDirectory() as folder:
        for qemu in qemus:
            for name in options.loop or LOOPS:
                measure(qemu, name, LOOPS[name], Path(folder), options)


def measure(qemu: str, name: str, loop: Loop, folder: Path, options: argparse.Namespace) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    image, stub = assemble(folder, "micro", HOW=VMCALL, COUNT=options.events), folder / "stub"
    site = site_of(image)
    for _ in range(options.rounds):
        with guest(qemu, image, stub) as pid:
            ours.append(run(loop, engine, stub, site, options.events, pid).rate)
        with guest(qemu, image, stub):
            theirs.append(by_hand(stub, site, options.events, folder / "loop.py"))
    engines, gdbs = statistics.median(ours), statistics.median(theirs)
    line: dict[str, object] = {
        "qemu": version(qemu),
        "loop": name,
        "engine": engines,
        "gdb": gdbs,
        "ratio": engines / gdbs,
    }
    text = f"{line['qemu']:8} {name:8} {engines:7.0f} {gdbs:6.0f} {engines / gdbs:5.2f}"
    report(options, line, text)


if __name__ == "__main__":
    main()
