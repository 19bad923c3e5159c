"""The guest `guests/device.asm` in QEMU with the device, and the hosts that serve it."""

import json
from contextlib import asynccontextmanager

import pytest
from children import run_beside
from served_machine import ServedMachine

from vmibridge import open_backend
from vmibridge.backends.qemu.process import QemuProcess

NO_ANSWER, HOST_GONE, NO_DEVICE, FAULT = 37, 39, 41, 43
"""Exit statuses of QEMU, beside those of the micro guest."""
mostly_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop", marks=pytest.mark.slow),
        pytest.param(("trio", {}), id="trio", marks=pytest.mark.slow),
    ],
)
"""What does not depend on the loop: on the others it is slow."""
ECAM = 0xE0000000
"""Where config space is on microvm (QEMU, include/hw/i386/microvm.h)."""


class DeviceMachine(ServedMachine):
    """QEMU with one guest, and the hosts that serve it."""

    def __init__(self, qemu, build_guest, folder, accel="tcg"):
        super().__init__()
        self.socket = folder / "s"
        self.qemu, self._build_guest, self._accel = qemu, build_guest, accel

    def command(self, *options, machine="q35", share="on", timeout=None, **defines):
        if machine == "microvm":
            defines["ECAM"], machine = ECAM, "microvm,pcie=on"
        image = self._build_guest("device", **defines)
        device = {
            "driver": "vfio-user-pci",
            "id": "bridge",
            "rombar": 0,
            "socket": {"path": str(self.socket), "type": "unix"},
        }
        if timeout is not None:
            device["x-msg-timeout"] = timeout
        memory = []
        if share is not None:
            machine += ",memory-backend=ram"
            memory = ["-object", f"memory-backend-memfd,id=ram,size=32M,share={share}"]
        return [
            *(self.qemu, "-accel", self._accel, "-M", machine, "-m", "32", *memory),
            *("-smp", str(defines.get("CPUS", 1)), "-nodefaults", "-display", "none"),
            *("-kernel", str(image), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-device", json.dumps(device), *options),
        ]

    def start(self, *options, **given):
        """QEMU with its monitor, for an `async with`."""
        return QemuProcess(self.command(*options, **given))

    async def run(self, *options, **defines):
        """Run QEMU to its end; returns what it was."""
        self.done = await run_beside(self.command(*options, **defines))
        return self.done.returncode

    @asynccontextmanager
    async def host(self, handler, options="kernel=8", **settings):
        """A host in a block, which ends when the run does."""
        async with (
            open_backend(f"vfio-user:unix:{self.socket}?{options}") as backend,
            self.served(backend, handler, **settings) as server,
        ):
            self.backend = backend
            yield server
