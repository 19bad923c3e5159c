"""The micro guest in QEMU with the plugin, and the hosts that serve it."""

from contextlib import asynccontextmanager

from children import run_beside
from served_machine import ServedMachine

from vmibridge import open_backend
from vmibridge.backends.qemu.process import QemuProcess


class Machine(ServedMachine):
    """QEMU with one guest, and the hosts that serve it."""

    def __init__(self, qemu, plugin, build_guest, folder):
        super().__init__()
        self.socket = folder / "s"
        self.qemu, self._plugin, self._build_guest = qemu, plugin, build_guest

    def command(self, arguments="", *, guest="micro", options="", **defines):
        image = self._build_guest(guest, **defines)
        if "AP_COUNT" in defines:
            options += " -smp 2"
        return [
            *(self.qemu, *["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]),
            *("-kernel", str(image), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-plugin", f"file={self._plugin},socket={self.socket}{arguments}"),
            *options.split(),
        ]

    def start(self, arguments="", **given):
        """QEMU with its monitor, for an `async with`."""
        return QemuProcess(self.command(arguments, **given))

    async def run(self, arguments="", **defines):
        """Run QEMU to its end; returns what it was."""
        self.done = await run_beside(self.command(arguments, **defines))
        return self.done.returncode

    @asynccontextmanager
    async def host(self, handler, **settings):
        """A host in a block, which ends when the run does."""
        async with (
            open_backend(f"qemu-plugin:unix:{self.socket}") as backend,
            self.served(backend, handler, **settings) as server,
        ):
            yield server
