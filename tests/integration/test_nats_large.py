"""Guest memory that takes longer over NATS than a server may be silent, who is not given up."""

import logging
from contextlib import asynccontextmanager

import anyio
import pytest
from nats_parts import AT, ask, nats_server
from patience import HUNG
from remote_parts import carry, served

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest

# One loop of those that nats-py has: what is large takes its time on each.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

SIZE = 2 << 20
SILENCE = 1.0
PIECE, PAUSE = 32 << 10, 0.04
"""About 800 kB a second, so that `SIZE` bytes take more than twice the silence."""


class Large(BridgeHandler[None]):
    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100

    def __init__(self):
        self.runs = 0

    @method(1)
    async def read(self, vmi, packet):
        self.runs += 1
        return BridgeResponse(value1=len(await vmi.memory.read_physical(AT, SIZE)))

    @method(2)
    async def write(self, vmi, packet):
        self.runs += 1
        await vmi.memory.write_physical(AT, b"\1" * SIZE)
        return BridgeResponse(value1=SIZE)


@asynccontextmanager
async def slow_link(port):
    """A port with `port` behind it, which takes bytes slowly, and gives them at once."""

    async def pass_on(source, sink, piece, pause):
        try:
            while True:
                data = await source.receive(piece)
                await sink.send(data)
                await anyio.sleep(pause)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            await source.aclose()
            await sink.aclose()

    async def serve(near):
        far = await anyio.connect_tcp("127.0.0.1", port)
        async with far, near, anyio.create_task_group() as both:
            both.start_soon(pass_on, near, far, PIECE, PAUSE)
            both.start_soon(pass_on, far, near, 65536, 0)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.cancel_scope.cancel()


# The end that sends what is large is behind the slow link.
@pytest.mark.parametrize(("code", "end"), [(1, "agent"), (2, "server")], ids=["read", "write"])
async def test_a_handler_runs_once_over_a_slow_link(tmp_path, caplog, code, end):
    caplog.set_level(logging.WARNING, "vmibridge")
    handler = Large()

    async def guest(vm):
        assert (await vm.call(ask(code))).rax == SIZE

    vm = FakeGuest(guest, memory={AT: bytes(SIZE)}, vm="web")
    with nats_server(tmp_path, "max_payload: 65536") as nats, anyio.fail_after(HUNG):
        async with slow_link(nats.port) as port:
            slow = f"nats://127.0.0.1:{port}"
            of_server, of_agent = (slow, nats.url) if end == "server" else (nats.url, slow)
            async with served(of_server, handler, settings=ServerSettings(timeout=60)):
                agent, _ = await carry(vm, f"{of_agent}?silence={SILENCE}")
    assert handler.runs == 1
    assert agent.counts.answered == 1
    assert [record.getMessage() for record in caplog.records] == []
