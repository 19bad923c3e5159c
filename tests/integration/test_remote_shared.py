"""One shared handler for the VMs of several agents, over sockets and over NATS."""

import anyio
import pytest
from base_handlers import HandlerWithLives
from nats_parts import ON_ASYNCIO, nats_server
from remote_parts import carry, served
from waiting import until

from vmibridge import BridgePacket, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest

CALLS = 50


class Counter(HandlerWithLives):
    """Counts the calls of all VMs; two at a time would spoil that."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    shared = True
    serial = True

    def __init__(self):
        self.count = 0
        super().__init__()

    @method(1)
    async def next(self, vmi, packet):
        count = self.count
        await anyio.sleep(0)
        self.count = count + 1
        return BridgeResponse(value1=self.count)


async def count_together(url):
    handler = Counter()
    got = []

    async def guest(vm):
        got.extend(
            [(await vm.call(BridgePacket(STANDARD_MAGIC, 0x0100, 1))).rax for _ in range(CALLS)]
        )

    async with served(url, handler, settings=ServerSettings(timeout=60)) as server:
        async with anyio.create_task_group() as agents:
            for name in ("red", "green", "blue"):
                agents.start_soon(carry, FakeGuest(guest, vm=name), url)
        await until(lambda: not server.vms)
        assert handler.lives == ["entered"]
    assert sorted(got) == list(range(1, 3 * CALLS + 1))
    assert handler.lives == ["entered", "left"]


@pytest.mark.anyio
async def test_it_counts_the_calls_of_all_vms_one_after_the_other(tmp_path):
    await count_together(f"unix:{tmp_path / 'x.sock'}")


class TestOnNats:
    pytestmark = ON_ASYNCIO

    async def test_it_does_so_too(self, tmp_path):
        with nats_server(tmp_path) as server:
            await count_together(server.url)
