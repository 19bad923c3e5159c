"""QEMU with a guest and its gdbstub, and the hosts that serve it."""

import os
import socket
import struct
import subprocess
from contextlib import asynccontextmanager

import anyio
import pytest
from children import opened
from needs import needs
from served_machine import ServedMachine

from vmibridge import open_backend
from vmibridge.aio import sockets
from vmibridge.backends.qemu.qmp import Qmp

KVM = "/dev/kvm"


class Machine(ServedMachine):
    """QEMU with one guest, and the host that serves it."""

    def __init__(self, qemu, accelerator, build_guest, folder):
        super().__init__()
        self.stub, self.qmp, self.folder = folder / "s", folder / "q", folder
        self.status = None
        self._command = [qemu, "-accel", accelerator]
        if accelerator == "kvm":
            self._command += ["-M", "microvm"]
        self._build_guest = build_guest

    @asynccontextmanager
    async def guest(self, *more, **defines):
        """QEMU, stopped at its begin; afterwards its exit status is known."""
        image = self._build_guest("micro", **defines)
        places = struct.unpack_from("<5Q", image.read_bytes(), 32)
        self.sites, self.ud_handler = places[:3], places[3]
        cpus = defines.get("CPUS", 1)
        async with self.booted("-S", *more, "-smp", str(cpus), "-kernel", str(image)):
            yield

    @asynccontextmanager
    async def booted(self, *arguments):
        """QEMU with these arguments."""
        command = [
            *(*self._command, "-m", "32", "-nodefaults", "-display", "none", *arguments),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-gdb", f"unix:{self.stub},server=on,wait=off"),
            *("-qmp", f"unix:{self.qmp},server=on,wait=off"),
        ]
        self.stub.unlink(missing_ok=True)
        async with opened(command, stderr=subprocess.DEVNULL) as self.process:
            while not (self.stub.exists() and self.qmp.exists()):
                await anyio.sleep(0.01)
            yield
            self.status = await self.process.wait()

    def spec(self, options="", *, ud=False):
        sites = [f"site={address:#x}" for address in self.sites]
        chosen = [f"ud-handler={self.ud_handler:#x}"] if ud else sites
        return f"qemu-gdb:unix:{self.stub}?{'&'.join(chosen)}{options}"

    @asynccontextmanager
    async def host(self, handler, *options, **more):
        """A host in a block, which ends when the run does."""
        async with (
            open_backend(self.spec(*options, **more)) as self.backend,
            self.served(self.backend, handler) as server,
        ):
            yield server

    async def run(self, handler, *options, ud=False, **defines):
        async with self.guest(**defines), self.host(handler, *options, ud=ud):
            pass
        return self.status

    async def command(self, name, **arguments):
        """A command to QMP."""
        async with Qmp(await sockets.connect(socket.AF_UNIX, str(self.qmp))) as qmp:
            return await qmp.execute(name, object, timeout=60, **arguments)

    async def human(self, line):
        """A line for the monitor that people use."""
        return await self.command("human-monitor-command", command_line=line)

    async def has_status(self, *wanted):
        """Wait until QMP says one of these."""
        while (status := (await self.command("query-status"))["status"]) not in wanted:
            await anyio.sleep(0.01)
        return status


def machine_of(kind, request, build_guest, folder):
    """The machine of a kind: the system's QEMU, the one of `make qemu` (`new`), or `kvm`."""
    if kind == "new":
        return Machine(request.getfixturevalue("qemu"), "tcg", build_guest, folder)
    path = needs("qemu-system-x86_64")
    if kind == "kvm" and not os.access(KVM, os.R_OK | os.W_OK):
        pytest.skip(f"no {KVM} that can be opened: as root, modprobe kvm_intel or kvm_amd")
    return Machine(path, "kvm" if kind == "kvm" else "tcg", build_guest, folder)
