"""What a call costs through the QEMU device, against less and against other ways into a guest.

    python benchmarks/qemu_device.py [--qemu PATH] [--events N] [--rounds N] [--accel tcg] [--json]

All sides have the same QEMU, whose guest makes calls one after the other on one vCPU, and checks
every answer; under KVM from ring 3.

- *device*: the engine with the backend `vfio-user` and an async handler; a call is a slot in shared
  memory, and a write to its doorbell.
- *bare*: a blocking loop over the same device (`device_bare.py`).
- *plugin*: the engine with the backend `qemu-plugin`; a call is a VMCALL. Only under TCG.
- *gdb*: the engine with the backend `qemu-gdb`; a tenth of the calls. Only under KVM.

Rounds alternate between the sides. The process pins itself, and so QEMU, to one core. Two figures
are shown: CPU time of a call, of this process and of QEMU together, the least of the rounds; and
calls a second, the median, which depends much on what else the machine does.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import (
    LOOPS,
    Figures,
    Invert,
    Loop,
    assemble,
    options_of,
    pin,
    qemu_command,
    report,
    run,
    served,
)
from device_bare import bare
from qemu_gdb import engine, guest, site_of

from vmibridge.backends.device.arguments import device_arguments
from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu
from vmibridge.backends.qemu.plugin.build import build_plugin

SIDES = {"tcg": ("device", "bare", "plugin"), "kvm": ("device", "bare", "gdb")}
MEMORY = 128 << 20


class Stage:
    """The guests, and the QEMU that all sides use, in a folder of their own."""

    def __init__(self, folder: Path, qemu: str, accel: str, events: int) -> None:
        self.folder, self.qemu, self.accel, self.events = folder, qemu, accel, events
        self.socket = folder / "s"
        self.plugin = build_plugin(folder / "plugin.so") if accel == "tcg" else None

    def image(self, name: str, events: int) -> Path:
        return assemble(self.folder, name, COUNT=events, USER=int(self.accel == "kvm"))

    def measure(self, side: str, loop: Loop) -> Figures:
        """One run of a side."""
        if side == "gdb":
            events = self.events // 10
            image, stub = self.image("micro", events), self.folder / "stub"
            with guest(self.qemu, image, stub, self.accel) as pid:
                return run(loop, engine, stub, site_of(image), events, pid)
        if side == "plugin":
            command = qemu_command(self.qemu, self.image("micro", self.events))
            command += ["-plugin", f"file={self.plugin},socket={self.socket}"]
            spec = f"qemu-plugin:unix:{self.socket}"
            return run(loop, served, spec, Invert(), command, self.events)
        image = self.image("device", self.events)
        command = device_command(self.qemu, image, self.socket, self.accel)
        if side == "bare":
            return bare(self.socket, command, self.events)
        return run(loop, served, f"vfio-user:unix:{self.socket}", Invert(), command, self.events)


def device_command(qemu: str, image: Path, socket: Path, accel: str) -> list[str]:
    """QEMU with the device."""
    command = qemu_command(qemu, image, accel, MEMORY)
    return [*command, "-M", "q35", *device_arguments(socket, 5.0, MEMORY)]


def main() -> None:
    parser = options_of(__doc__, events=20_000, rounds=5)
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    parser.add_argument("--accel", choices=SIDES, default="tcg")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    pin()
    if not options.json:
        print(f"{options.events} calls, {options.rounds} rounds, {options.accel}")
        print("loop     side    CPU us a call  device to it  calls a second  device to it")
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), qemu, options.accel, options.events)
        for name in options.loop or LOOPS:
            compare(stage, name, options)


def compare(stage: Stage, name: str, options: argparse.Namespace) -> None:
    figures: dict[str, list[Figures]] = {side: [] for side in SIDES[options.accel]}
    for _ in range(options.rounds):
        for side, of_side in figures.items():
            of_side.append(stage.measure(side, LOOPS[name]))
    costs = {side: min(each.cpu_us for each in rounds) for side, rounds in figures.items()}
    rates = {
        side: statistics.median(each.rate for each in rounds) for side, rounds in figures.items()
    }
    for side in figures:
        cost, rate = costs["device"] / costs[side], rates["device"] / rates[side]
        line: dict[str, object] = {
            "accel": options.accel,
            "loop": name,
            "side": side,
            "cpu_us": costs[side],
            "device_to_cpu": cost,
            "rate": rates[side],
            "device_to_rate": rate,
        }
        text = (
            f"{name:8} {side:7} {costs[side]:13.1f} {cost:13.2f} {rates[side]:15.0f} {rate:13.2f}"
        )
        report(options, line, text)


if __name__ == "__main__":
    main()
