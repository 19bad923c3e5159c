"""A guest that calls methods of one handler, and what became of each call."""

import itertools

import anyio
import pytest

from vmibridge import BridgeHandler, BridgePacket, BridgeServer
from vmibridge.testing import FakeGuest

MAGIC, REQUEST = 0x1234_5678, 1

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
on_trio = pytest.mark.parametrize("anyio_backend", [("trio", {})], ids=["trio"])


class Misbehaves(BridgeHandler[object]):
    """Base of handlers that do something to themselves, their task or their loop."""

    MAGIC = MAGIC
    REQUEST = REQUEST


class Caller:
    """A guest whose calls return the outcome."""

    def __init__(self):
        self.vm = None
        self._numbers = itertools.count(1)
        self.waiting = {}

    async def call(self, method=1, *, value1=0, vcpu=0):
        number = next(self._numbers)
        came, _ = self.waiting[number] = anyio.Event(), []
        await self.vm.call(BridgePacket(MAGIC, REQUEST, method, value1, 0, 0, number), vcpu=vcpu)
        await came.wait()
        return self.waiting.pop(number)[1][0]

    def saw(self, outcome):
        came, told = self.waiting[outcome.packet.value4]
        told.append(outcome)
        came.set()


async def run_guest(handler, scenario, **settings):
    """Run `scenario(caller)` as the guest of a server; returns what it returns."""
    caller, results = Caller(), []

    async def guest(vm):
        caller.vm = vm
        results.append(await scenario(caller))

    async with FakeGuest(guest) as backend:
        async for outcome in BridgeServer(backend, handler, **settings).run():
            caller.saw(outcome)
    return results[0]
