"""The micro guest in QEMU with the plugin, and the hosts that serve it."""

from collections import Counter
from contextlib import asynccontextmanager

import anyio

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, method, open_backend
from vmibridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.qemu.process import QemuProcess

CPUID, VMCALL, VMMCALL = 1, 2, 3
INVERT, REVERSE, HOLD, SLOW = 1, 2, 3, 4
ALL_RIGHT, NO_STAMPS = 33, 35
"""Exit statuses of QEMU."""
ENDLESS = 2_000_000_000
MASK64 = (1 << 64) - 1


class Machine:
    """QEMU with one guest, and the hosts that serve it."""

    def __init__(self, qemu, plugin, build_guest, folder):
        self.socket = folder / "s"
        self.outcomes = Counter()
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
        self.done = await anyio.run_process(self.command(arguments, **defines), check=False)
        return self.done.returncode

    @asynccontextmanager
    async def host(self, handler, **settings):
        """A host in a block, which ends when the run does."""
        async with open_backend(f"qemu-plugin:unix:{self.socket}") as backend:
            server = BridgeServer(backend, Bridge(handler), timeout=60, **settings)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._consume, server)
                yield server
        self.ends = [(end.vcpu, end.reason) for end in server.summary.guest.vcpus]

    async def _consume(self, server):
        async for outcome in server.run():
            self.outcomes[outcome.kind.value] += 1


class Work(BridgeHandler[None]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    def __init__(self):
        self.begun = anyio.Event()
        self.end = anyio.Event()
        self.where = set()
        self.seen = Counter()

    @method(INVERT)
    async def invert(self, vmi, packet):
        self.where.add((vmi.event.width, vmi.event.ring, vmi.vcpu))
        self.seen[vmi.vcpu] += 1
        if packet.value1 == 100:
            self.begun.set()
        return BridgeResponse(~packet.value1 & MASK64)

    @method(REVERSE)
    async def reverse(self, vmi, packet):
        text = await vmi.memory.read(packet.value2, packet.value3)
        assert text == b"hello to guest!!"
        await vmi.memory.write(packet.value2 + 16, text[13:5:-1])
        return BridgeResponse(~packet.value1 & MASK64)

    # The run ends when it has ended, or its deadline has passed.
    @method(HOLD, timeout=1)
    async def hold(self, vmi, packet):
        self.begun.set()
        await anyio.sleep_forever()

    @method(SLOW)
    async def slow(self, vmi, packet):
        self.begun.set()
        await self.end.wait()
        return BridgeResponse(~packet.value1 & MASK64)


class OfAnother(Work):
    MAGIC = 0x1234_5678
