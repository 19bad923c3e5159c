"""Handlers that fill the threads of the loop hold up nothing that the server does in its own."""

import socket
import threading

import anyio
import anyio.to_thread
import pytest
from misbehaving import Misbehaves, run_guest
from patience import HUNG

from vmibridge import BridgeResponse, OutcomeKind, method
from vmibridge.aio import sockets
from vmibridge.recording import Recorder
from vmibridge.recording.replay.backend import ReplayBackend

pytestmark = pytest.mark.anyio


class FillsThreads(Misbehaves):
    """Method 1 is stuck in a thread until it is let go."""

    def __init__(self):
        self.go_on = threading.Event()
        self.stuck = 0

    @method(1, timeout=0.02)
    async def stick(self, vmi, packet):
        self.stuck += 1
        await anyio.to_thread.run_sync(self.go_on.wait)
        return BridgeResponse(value1=1)

    @method(2)
    async def answer(self, vmi, packet):
        return BridgeResponse(value1=1)


async def fill(caller, handler):
    """Every thread of the loop is held, and more wait for one."""
    total = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
    async with anyio.create_task_group() as tasks:
        for vcpu in range(1, total + 6):

            async def stick(vcpu=vcpu):
                await caller.call(1, vcpu=vcpu)

            tasks.start_soon(stick)


async def test_a_recorder_goes_on(tmp_path):
    handler = FillsThreads()
    file = tmp_path / "run.mcap"

    async def scenario(caller):
        try:
            await fill(caller, handler)
            with anyio.fail_after(HUNG):
                return [(await caller.call(2)).kind for _ in range(3000)]
        finally:
            handler.go_on.set()

    async with Recorder(file, flush_traps=100) as recorder:
        kinds = await run_guest(handler, scenario, taps=[recorder])
    assert set(kinds) == {OutcomeKind.HANDLED}
    assert len(kinds) == 3000


async def test_sockets_are_made_found_and_removed(tmp_path):
    handler = FillsThreads()
    path = tmp_path / "some.sock"

    async def scenario(caller):
        try:
            await fill(caller, handler)
            with anyio.fail_after(HUNG):
                for _ in range(2):
                    sockets.close((await sockets.listen_unix(path, 0o600)).socket)
                listener = socket.create_server(("127.0.0.1", 0))
                with listener:
                    port = listener.getsockname()[1]
                    (await sockets.connect_tcp("localhost", port)).close()
        finally:
            handler.go_on.set()
        return True

    assert await run_guest(handler, scenario)


async def test_a_recording_is_opened_and_read(tmp_path):
    handler = FillsThreads()
    file = tmp_path / "run.mcap"

    async def record(caller):
        return [await caller.call(2) for _ in range(3)]

    async with Recorder(file) as recorder:
        await run_guest(handler, record, taps=[recorder])

    async def scenario(caller):
        try:
            await fill(caller, handler)
            with anyio.fail_after(HUNG):
                async with ReplayBackend(file) as backend:
                    return await backend.walk.source.read_on() != []
        finally:
            handler.go_on.set()

    assert await run_guest(handler, scenario)
