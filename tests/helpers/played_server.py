"""A server that says to an agent what a test tells it."""

from contextlib import asynccontextmanager

import anyio
import pytest
from patience import HUNG

from vmibridge import BridgePacket
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.transport import Agent
from vmibridge.transport.sockets.connection import Connection
from vmibridge.transport.sockets.endpoints import listen
from vmibridge.transport.urls import parse_url
from vmibridge.transport.wire import (
    FRAME_LIMIT,
    FROM_AGENT,
    End,
    Ended,
    Ping,
    Welcome,
)

PACKET = BridgePacket(STANDARD_MAGIC, 0x0100, 1, 5)
FALLBACK = (0xBAD, None, None, None)
INCARNATIONS = [bytes([n]) * 16 for n in range(9)]


def welcome(
    incarnation=INCARNATIONS[0],
    timeout=60_000,
    reads=(),
    vcpus=64,
    magics=(STANDARD_MAGIC,),
):
    return Welcome(1, incarnation, 0, magics, False, False, timeout, FALLBACK, vcpus, reads)


class FakeServer:
    """Takes connections one after the other, and says what it is told to."""

    def __init__(self, url):
        self.url = url
        self.accepted = []
        self.came = anyio.Event()
        self.connection = None
        self.frames = []

    async def run(self, *, task_status):
        listening = await listen(parse_url(self.url))
        task_status.started()
        try:
            await listening.accept(self._take)
        finally:
            listening.close()
            for each in (*self.accepted, self.connection):
                if each is not None:
                    each.close()

    def _take(self, accepted):
        self.accepted.append(Connection(accepted, FROM_AGENT))
        self.came.set()

    async def greet(self, answer=None):
        """Take the next connection, hear its HELLO and answer it."""
        with anyio.fail_after(HUNG):
            while not self.accepted:
                self.came = anyio.Event()
                await self.came.wait()
        if self.connection is not None:
            self.connection.close()
        self.connection = self.accepted.pop(0)
        self.connection.reader.limit = FRAME_LIMIT
        self.frames = []
        hello = await self.next()
        self.post(answer or welcome())
        return hello

    def post(self, frame):
        self.connection.post(frame)

    async def next(self):
        """The next frame that is no PING."""
        with anyio.fail_after(HUNG):
            while True:
                while not self.frames:
                    self.frames += await self.connection.receive()
                frame = self.frames.pop(0)
                if not isinstance(frame, Ping):
                    return frame

    async def nothing_comes(self):
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.05):
                self.frames += await self.connection.receive()
                raise AssertionError(self.frames)

    def hang_up(self):
        self.connection.close()


@asynccontextmanager
async def beside(backend, url, *, ends=True, **options):
    """An agent that carries `backend`, and a server that is played; `agent.end` at the end."""
    server = FakeServer(url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        async with backend:
            agent = Agent(backend, url, **{"longest_pause": 0.05, **options})

            async def run():
                agent.end = await agent.run()

            agent.ran = anyio.Event()
            tasks.start_soon(run)
            yield agent, server
            if ends:
                while not isinstance(await server.next(), End):
                    pass
                server.post(Ended())
            else:
                agent.stop(now=True)
                tasks.cancel_scope.cancel()
            with anyio.fail_after(HUNG):
                while not hasattr(agent, "end") and ends:
                    await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()


def guest_of(*calls):
    """A guest that calls once for each, and keeps what came back in `vm.answers`."""

    async def guest(vm):
        vm.answers = []
        for options in calls:
            vm.answers.append(await vm.call(PACKET, **options))

    return guest
