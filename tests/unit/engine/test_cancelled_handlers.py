"""Handlers that cancel their task, or are cancelled and do not take it as they should."""

import asyncio
from collections import Counter

import anyio
import pytest
from anyio.lowlevel import checkpoint
from engine_parts import MAGIC, serve, server_of, trap

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    OutcomeKind,
    method,
)
from vmibridge.testing import FakeBackend, FakeGuest

pytestmark = pytest.mark.anyio


class CancelsItsTask(BridgeHandler[None]):
    """On asyncio a handler can reach the task that it is run in."""

    MAGIC = MAGIC
    REQUEST = 1

    @method(1)
    async def and_returns(self, vmi, packet):
        asyncio.current_task().cancel()
        return BridgeResponse(value1=1)

    @method(2)
    async def and_waits(self, vmi, packet):
        asyncio.current_task().cancel()
        await anyio.sleep_forever()

    @method(3, timeout=0.01)
    async def when_it_is_overtaken(self, vmi, packet):
        try:
            await anyio.sleep_forever()
        finally:
            asyncio.current_task().cancel()

    @method(5)
    async def later(self, vmi, packet):
        asyncio.get_running_loop().call_later(0.001, asyncio.current_task().cancel)
        return BridgeResponse(value1=5)

    @method(4)
    async def well_behaved(self, vmi, packet):
        await anyio.sleep(0.001)
        return BridgeResponse(value1=4)


on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


@on_asyncio
@pytest.mark.parametrize(("code", "kind"), [(1, "handled"), (2, "cancelled"), (3, "timeout")])
async def test_a_handler_that_cancels_its_task_harms_nobody_else(code, kind):
    class SlowAnswers(FakeBackend):
        async def resume(self, event, writes):
            await anyio.sleep(0)
            await super().resume(event, writes)

    codes = [code, 4, 4] * 5
    events = [trap(seq, each, vcpu=seq % 2) for seq, each in enumerate(codes)]
    outcomes, _, _ = await serve(events, CancelsItsTask(), backend=SlowAnswers(events))
    counts = Counter(outcome.kind.value for outcome in outcomes)
    assert counts == Counter([kind, "handled", "handled"] * 5)


@on_asyncio
async def test_a_worker_that_a_handler_cancels_when_it_has_nothing_to_do_goes_on():
    async def guest(vm):
        assert (await vm.call(BridgePacket(MAGIC, 1, 5))).rax == 5
        await anyio.sleep(0.02)
        assert (await vm.call(BridgePacket(MAGIC, 1, 4))).rax == 4

    async with FakeGuest(guest) as backend:
        server = server_of(backend, Bridge(CancelsItsTask()))
        outcomes = [outcome async for outcome in server.run()]
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 2
    assert server.summary.guest is not None


@on_asyncio
async def test_a_cancelled_handler_that_awaits_what_others_cancelled_ends_only_itself():
    """A `CancelledError` that no cancel scope made, from a handler that was overtaken."""
    release, ended = anyio.Event(), anyio.Event()

    class Stubborn(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1
        timeout = 0.01

        async def handle(self, vmi, packet):
            if not packet.value1:
                with anyio.CancelScope(shield=True):
                    await release.wait()
                other = asyncio.get_running_loop().create_future()
                other.cancel()
                ended.set()
                await other
            return BridgeResponse(value1=packet.value1)

    async def guest(vm):
        assert (await vm.call(BridgePacket(MAGIC, 1, 1))).rax == 0xBAD
        release.set()
        await ended.wait()
        for _ in range(10):
            await checkpoint()
        assert (await vm.call(BridgePacket(MAGIC, 1, 1, 7))).rax == 7

    async with FakeGuest(guest) as backend:
        server = server_of(backend, Bridge(Stubborn()), fallback=BridgeResponse(value1=0xBAD))
        outcomes = [outcome async for outcome in server.run()]
    assert [outcome.kind.value for outcome in outcomes] == ["timeout", "handled"]


async def test_tasks_of_a_handler_may_fail_while_it_is_cancelled():
    """Which on trio raises a group of the cancellation and of what failed."""

    class Fails(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1

        async def fail(self):
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError("on the way out")

        async def handle(self, vmi, packet):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.fail)
                tasks.start_soon(anyio.sleep_forever)
                await anyio.sleep_forever()

    outcomes, _, _ = await serve([trap(seq, 1) for seq in (1, 2, 3)], Fails(), timeout=0.01)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.TIMEOUT] * 3


async def test_an_exit_of_a_handler_that_was_cancelled_ends_its_trap_alone():
    class Exits(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1

        async def handle(self, vmi, packet):
            try:
                await anyio.sleep_forever()
            finally:
                raise SystemExit(3)

    events = [trap(1, 1), trap(2, 1, vcpu=1)]
    outcomes, _, _ = await serve(events, Exits(), timeout=0.01)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.TIMEOUT] * 2
