"""Handlers that hang while they are entered or left end with the server."""

import asyncio

import anyio
import pytest
from misbehaving import Misbehaves, on_asyncio, run_guest

from vmibridge import Bridge, BridgeResponse, BridgeServer, method
from vmibridge.errors import HandlerLifeError
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio


class Lives(Misbehaves):
    def __init__(self):
        self.events = []
        self.began = anyio.Event()

    @method(1)
    async def go(self, vmi, packet):
        return BridgeResponse(value1=1)

    async def __aenter__(self):
        self.events.append("entered")

    async def __aexit__(self, *_):
        self.events.append("left")


class HangsAtItsEnd(Lives):
    REQUEST = 2

    async def __aexit__(self, *_):
        await anyio.sleep_forever()


class HangsAtItsStart(Lives):
    REQUEST = 2

    async def __aenter__(self):
        self.began.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.events.append("cancelled")


class HoldsAGroup(Lives):
    REQUEST = 3

    async def __aenter__(self):
        self.group = await anyio.create_task_group().__aenter__()
        self.group.start_soon(anyio.sleep_forever)

    async def __aexit__(self, *_):
        self.group.cancel_scope.cancel()
        await self.group.__aexit__(None, None, None)
        self.events.append("left")


class CancelsItsTaskAtItsStart(Lives):
    REQUEST = 2

    async def __aenter__(self):
        asyncio.current_task().cancel()


class CancelsItsTaskAtItsEnd(Lives):
    REQUEST = 2

    async def __aexit__(self, *_):
        await anyio.sleep(0)
        asyncio.current_task().cancel()


async def call_once(caller):
    await caller.call()


@pytest.mark.parametrize("shared", [False, True], ids=["of its VM", "shared"])
async def test_leaving_has_stop_timeout_and_the_others_are_left(shared):
    first, last = Lives(), HoldsAGroup()
    hangs = type("Hangs", (HangsAtItsEnd,), {"shared": shared})()
    bridge = Bridge(first, hangs, last)
    with (
        anyio.fail_after(60),
        pytest.raises(HandlerLifeError, match=r"hangs did not end in 0\.1 s"),
    ):
        await run_guest(bridge, call_once, stop_timeout=0.1)
    assert first.events == ["entered", "left"]
    assert last.events == ["left"]


@on_asyncio
@pytest.mark.parametrize("shared", [False, True], ids=["of its VM", "shared"])
@pytest.mark.parametrize(
    ("kind", "what"), [(CancelsItsTaskAtItsStart, "start"), (CancelsItsTaskAtItsEnd, "end")]
)
async def test_one_that_cancels_its_task_with_its_last_step_is_named(kind, what, shared):
    first = Lives()
    first.shared = shared
    cancels = type("Cancels", (kind,), {"shared": shared})()
    with pytest.raises(HandlerLifeError, match=f"cancels did not {what}: it cancelled its task"):
        await run_guest(Bridge(first, cancels), call_once)
    assert first.events == ["entered", "left"]


@pytest.mark.parametrize("shared", [False, True], ids=["of its VM", "shared"])
@pytest.mark.parametrize("now", [False, True], ids=["grace", "now"])
async def test_a_stop_ends_what_is_being_entered(shared, now):
    async def guest(vm):
        pytest.fail("it has no handlers")

    first = Lives()
    first.shared = shared
    hangs = type("Hangs", (HangsAtItsStart,), {"shared": shared})()
    grace = 60 if now else 0.01
    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(first, hangs), grace=grace, stop_timeout=600)

        async def stop():
            await hangs.began.wait()
            server.stop(now=now)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stop)
                assert [outcome async for outcome in server.run()] == []
    assert first.events == ["entered", "left"]
    assert hangs.events == ["cancelled"]
