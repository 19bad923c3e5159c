"""A plugin or a gdbstub that does not read what it is sent: memory of the host is bounded."""

import socket

import anyio
import pytest

from vmibridge.backends.qemu.gdb import client as gdb_client
from vmibridge.backends.qemu.gdb.client import CLOSED, ClientLostError, GdbClient, reading
from vmibridge.backends.qemu.plugin import vcpu as plugin_vcpu
from vmibridge.backends.qemu.plugin.protocol import FrameReader
from vmibridge.backends.qemu.plugin.vcpu import Vcpu
from vmibridge.errors import BackendError, GuestMemoryError

pytestmark = pytest.mark.anyio
MAX_UNSENT = 100_000
PIECE = bytes(10_000)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        yield ours, theirs


async def test_a_plugin_loses_the_connection_of_its_vcpu(pair, monkeypatch):
    monkeypatch.setattr(plugin_vcpu, "_MAX_UNSENT", MAX_UNSENT)
    vcpu = Vcpu(pair[0], FrameReader(), 0, None)
    sent = 0
    with pytest.raises(BackendError, match="does not read"), anyio.fail_after(10):
        while sent < 100 * MAX_UNSENT:
            # A handler that gives up each of its writes.
            with anyio.CancelScope() as scope:
                scope.cancel()
                await vcpu.send(PIECE)
            sent += len(PIECE)
    assert sent > MAX_UNSENT
    # What it was sent is not whole: its vCPU has not gone on.
    assert vcpu.waits
    with pytest.raises(GuestMemoryError):
        await vcpu.access(0x1000, PIECE, 10)
    with pytest.raises(anyio.EndOfStream), anyio.fail_after(10):
        await vcpu.receive(lambda _kind, _body: None)


async def test_a_gdbstub_loses_its_connection(pair, monkeypatch):
    monkeypatch.setattr(gdb_client, "_MAX_UNSENT", MAX_UNSENT)
    client = GdbClient(pair[0])
    sent = 0
    with anyio.fail_after(10):
        async with reading(client):
            with pytest.raises(ClientLostError, match="does not read"):
                while sent < 100 * MAX_UNSENT:
                    client.post(PIECE, 1, lambda _reply: None)
                    sent += len(PIECE)
            assert sent > MAX_UNSENT
            await client.lost.wait()
    assert client.why_lost == CLOSED
