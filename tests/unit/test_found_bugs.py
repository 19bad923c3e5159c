"""Bugs that the state machine of `test_trap_life.py` found, each reduced to a test."""

import asyncio

import anyio
import pytest

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, BridgeServer
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
ASK = BridgePacket(MAGIC, 1, 1)
FALLBACK = 0xBAD


async def test_a_cancelled_handler_that_awaits_what_others_cancelled_ends_only_itself(
    anyio_backend_name,
):
    """A `CancelledError` that no cancel scope made, from a handler that was overtaken."""
    if anyio_backend_name == "trio":
        pytest.skip("there a Cancelled cannot be made by hand")
    release = anyio.Event()

    class Stubborn(BridgeHandler):
        MAGIC = MAGIC
        REQUEST = 1
        timeout = 0.01

        async def handle(self, vmi, packet):
            if packet.value1:
                return BridgeResponse(value1=packet.value1)
            with anyio.CancelScope(shield=True):
                await release.wait()
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

    async def guest(vm):
        assert (await vm.call(ASK)).rax == FALLBACK
        release.set()
        await anyio.sleep(0.05)
        assert (await vm.call(ASK.with_value1(7))).rax == 7

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Stubborn(), fallback=BridgeResponse(value1=FALLBACK))
        outcomes = [outcome async for outcome in server.run()]
    assert [outcome.kind.value for outcome in outcomes] == ["timeout", "handled"]
