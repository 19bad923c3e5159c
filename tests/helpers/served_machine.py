"""The hosts of a guest in QEMU, by whatever backend."""

from collections import Counter
from contextlib import asynccontextmanager

import anyio

from vmibridge import Bridge, BridgeServer
from vmibridge.backends.qemu.ram import SharedRam


class ServedMachine:
    """What a machine of the tests has from its host."""

    def __init__(self):
        self.outcomes = Counter()
        self.events = []
        """The first thousand traps that were answered."""

    @asynccontextmanager
    async def served(self, backend, handler, **settings):
        """A host in a block, which ends when the run does."""
        server = BridgeServer(backend, Bridge(handler), timeout=60, **settings)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._consume, server)
            yield server
        self.ends = [(end.vcpu, end.reason) for end in server.summary.guest.vcpus]

    async def _consume(self, server):
        async for outcome in server.run():
            self.outcomes[outcome.kind.value] += 1
            if len(self.events) < 1000:
                self.events.append(outcome.event)


def shared_ram_reads(monkeypatch):
    """What is read from the files of shared memory from now on; `None` where one was of no use."""
    read, found = SharedRam.read, []

    def reading(self, address, size):
        found.append(read(self, address, size))
        return found[-1]

    monkeypatch.setattr(SharedRam, "read", reading)
    return found
