"""The demo of the Linux guest: its programs and its kernel call, and check every answer.

    python guest/linux/demo.py [--via plugin|device] [--count N] [--cpus N]

Boots an unmodified Debian kernel in stock QEMU, and serves it with the handler of `exchange.py` in
this process. Shows what the guest says, and the traps between the lines. Ends with 0 when the guest
says that all was right.

| via | who calls |
|---|---|
| plugin | programs and a kernel module, by CPUID, VMCALL and VMMCALL |
| device | programs: through sysfs, by the driver, and by the driver with memory of their own |
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from vmibridge import Bridge, BridgeResponse, BridgeServer, Outcome, TrapReason, open_backend
from vmibridge.backends.device.arguments import device_arguments
from vmibridge.backends.device.backend import DeviceOptions
from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.config import load_handlers
from vmibridge.text import printable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LINUX = ROOT / ".linux"
SECONDS = 180.0
MEBIBYTES = 256
"""Of the guest's memory."""


class Way(NamedTuple):
    """How the guest reaches the host."""

    backend: str
    """Its spec."""
    arguments: list[str]
    """QEMU's, for this way alone."""
    calls: str
    """What the guest does: `vmibridge=` of its kernel's command line."""


def by_plugin(folder: Path) -> Way:
    """Build the plugin in this folder, where the socket is made, too."""
    plugin, socket = build_plugin(folder / "vmibridge-plugin.so"), folder / "socket"
    arguments = ["-M", "pc", "-plugin", f"file={plugin},socket={socket}"]
    return Way(f"qemu-plugin:unix:{socket}", arguments, "user,kernel")


def by_device(folder: Path) -> Way:
    """The first slot is the kernel's: so the host believes the spaces that the driver enters."""
    socket = folder / "socket"
    device = device_arguments(socket, DeviceOptions().timeout, MEBIBYTES << 20)
    return Way(f"vfio-user:unix:{socket}?kernel=1", ["-M", "q35", *device], "sysfs,driver,shared")


WAYS = {"plugin": by_plugin, "device": by_device}


class Traps:
    """Shows the first trap of each kind, and in the end how many there were.

    The same ring, width, instruction, request and outcome make a kind. The handshake is not shown.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, str]] = Counter()
        self._shown: set[tuple[object, ...]] = set()

    async def show(self, server: BridgeServer) -> None:
        async for outcome in server.run():
            event, packet = outcome.event, outcome.packet
            instruction = event.reason.value
            if event.reason is not TrapReason.DEVICE:
                instruction += str(event.width)
            self.counts[event.ring, instruction] += 1
            kind = (event.ring, instruction, packet.request, packet.method, outcome.kind)
            if kind not in self._shown and packet.request:
                self._shown.add(kind)
                print(f"  trap  {self.line(outcome, instruction)}")

    @staticmethod
    def line(outcome: Outcome, instruction: str) -> str:
        event, packet = outcome.event, outcome.packet
        lane = "slot" if event.reason is TrapReason.DEVICE else "vcpu"
        answer = BridgeResponse() if outcome.response is None else outcome.response
        return (
            f"{lane} {event.vcpu} ring {event.ring} {instruction:9} "
            f"{outcome.handler}/{packet.method:04x} {f'{packet.value1:x} {packet.value2:x}':22} "
            f"{outcome.kind.value:8} {f'{answer.value1 or 0:x} {answer.value2 or 0:x}':22} "
            f"{answer.output or ''}"
        ).rstrip()

    def tell(self) -> None:
        print(f"{self.counts.total()} traps:")
        for (ring, instruction), count in sorted(self.counts.items()):
            print(f"  ring {ring} {instruction:9} {count:5}")


def qemu() -> str:
    return os.environ.get("VMIBRIDGE_QEMU", str(ROOT / ".qemu/qemu-system-x86_64"))


async def show_guest(process: Process) -> bool:
    """Show what it says, line by line; whether it says that all was right."""
    right, rest = False, ""
    async for text in TextReceiveStream(process.stdout, errors="replace"):
        *lines, rest = (rest + text).split("\n")
        for line in (printable(line.rstrip("\r")) for line in lines):
            right = right or line == "vmibridge: all right"
            print(f"guest   {line.removeprefix('vmibridge: ')}")
    return right


async def run(way: Way, options: argparse.Namespace) -> bool:
    kernel = (
        f"console=ttyS0 quiet panic=-1 no_timer_check vmibridge={way.calls} count={options.count}"
    )
    command = [
        qemu(),
        *f"-accel tcg -m {MEBIBYTES} -smp {options.cpus} -nodefaults -display none".split(),
        *("-no-reboot", "-serial", "stdio", *way.arguments),
        *("-kernel", str(LINUX / "vmlinuz"), "-initrd", str(LINUX / "initrd")),
        *("-append", kernel),
    ]
    traps = Traps()
    with anyio.fail_after(SECONDS):
        async with open_backend(way.backend) as backend:
            bridge = Bridge(*load_handlers([str(HERE / "exchange.py")]))
            server = BridgeServer(backend, bridge)
            async with (
                await anyio.open_process(command, stderr=None) as process,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(traps.show, server)
                right = await show_guest(process)
                if await process.wait():
                    # It may have ended before it connected, for which the server waits.
                    server.stop()
    traps.tell()
    return right and process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--via", choices=WAYS, default="plugin", help="how it calls; default plugin"
    )
    parser.add_argument("--count", type=int, default=20, help="calls of each kind; default 20")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of the guest; default 2")
    options = parser.parse_args()
    if not Path(qemu()).exists():
        print(f"demo-linux: {qemu()} is missing: make qemu", file=sys.stderr)
        return 1
    if subprocess.run([HERE / "build-guest"], check=False).returncode:
        return 1
    with tempfile.TemporaryDirectory() as folder:
        right = anyio.run(run, WAYS[options.via](Path(folder)), options)
    print("demo-linux: passed" if right else "demo-linux: FAILED", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
