"""A device backend with a QEMU that is played (`vfio_client`), and what it hands on."""

from contextlib import asynccontextmanager

import anyio
from vfio_client import Client
from waiting import until

from vmibridge.backends import open_backend
from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.trap import RegisterWrites, TrapFilter

OURS = TrapFilter(magics=frozenset({0x42494D56}))


class Sink:
    """Takes traps, while it has room."""

    def __init__(self):
        self.events, self.abandoned = [], []
        self.has_room, self.is_closed = True, False

    def put_nowait(self, event):
        if self.is_closed:
            raise TrapQueueClosedError("closed")
        if not self.has_room:
            raise anyio.WouldBlock
        self.events.append(event)

    async def put(self, event):
        await until(lambda: self.has_room)
        self.put_nowait(event)

    def abandon(self, event):
        # As the engine's: it has to be called where anyio knows its loop.
        anyio.Event().set()
        self.abandoned.append(event)


class Served:
    """A backend that runs, and the QEMU that has connected to it."""

    def __init__(self, backend):
        self.backend, self.sink, self.end = backend, Sink(), None

    async def run(self):
        self.end = await self.backend.run(OURS, self.sink)

    async def connect(self):
        return await anyio.to_thread.run_sync(Client, self.backend.path)

    async def answer(self, *values, event=None):
        event = event or self.sink.events[-1]
        await self.backend.resume(event, RegisterWrites(0, *values))

    @property
    def connection(self):
        return self.backend._connection


@asynccontextmanager
async def serving(tmp_path, options="kernel=2&hold=1s&timeout=10s"):
    async with open_backend(f"vfio-user:unix:{tmp_path / 's'}?{options}") as backend:
        served = Served(backend)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(served.run)
                yield served
                backend.stop()


async def beside(function, *arguments):
    return await anyio.to_thread.run_sync(function, *arguments)


async def called(served):
    before = len(served.sink.events)
    await until(lambda: len(served.sink.events) > before)
    return served.sink.events[-1]
