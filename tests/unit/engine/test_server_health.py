"""What a `BridgeServer` says of its health."""

import anyio
import pytest
from base_handlers import EchoHandler
from waiting import until

from vmibridge import BridgeHandler, BridgeServer
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.taps import Hindrance, Tap
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio


class Enters(EchoHandler):
    def __init__(self, may_enter):
        self._may_enter = may_enter

    async def __aenter__(self):
        await self._may_enter.wait()
        return self

    async def __aexit__(self, *_):
        pass


class Fails(BridgeHandler[int]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100

    async def handle(self, vmi, packet):
        raise AssertionError

    async def __aenter__(self):
        raise RuntimeError("told to")

    async def __aexit__(self, *_):
        pass


def told(server):
    return [(each.code, each.text, each.fails) for each in server.health()]


def idle(name="vm"):
    async def guest(_):
        await anyio.sleep_forever()

    return FakeGuest(guest, vm=name)


async def consume(server):
    async for _ in server.run():
        pass


async def test_it_starts_serves_and_stops():
    may_enter = anyio.Event()
    async with idle() as vm:
        server = BridgeServer(vm, Enters(may_enter))
        assert told(server) == [("starting", "the VMs are being opened", "started")]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, server)
            entering = [("starting", "vm vm: its handlers are being entered", "started")]
            await until(lambda: told(server) == entering)
            may_enter.set()
            await until(lambda: not told(server))
            server.stop()
            stopping = [("stopping", "every guest has ended, or is stopped", "ready")]
            assert told(server) == stopping
        assert told(server) == stopping, "it has ended"


async def test_one_vm_of_several_that_failed_is_named_and_one_that_ended_is_not():
    async def fails(_):
        raise RuntimeError("a bad VM")

    async def ends(_):
        pass

    first, bad, ended = idle("first"), FakeGuest(fails, vm="bad"), FakeGuest(ends, vm="ended")
    async with first, bad, ended, anyio.create_task_group() as tasks:
        server = BridgeServer([first, bad, ended], lambda _: EchoHandler())

        async def run():
            with pytest.raises(RuntimeError):
                await consume(server)

        tasks.start_soon(run)
        await until(
            lambda: told(server) == [("vm-failed", "vm bad: RuntimeError: a bad VM", "ready")]
        )
        server.stop()


async def test_handlers_that_could_not_be_entered_at_a_reload_are_told():
    async with idle() as vm, anyio.create_task_group() as tasks:
        server = BridgeServer(vm, EchoHandler())
        tasks.start_soon(consume, server)
        await until(lambda: not told(server))
        await server.reload(Fails())
        assert told(server) == [("reload-failed", "vm vm: keeps its handlers", None)]
        await server.reload(EchoHandler())
        assert told(server) == []
        server.stop()


@pytest.mark.parametrize("holds", [True, False], ids=["stop", "continue"])
async def test_a_tap_that_is_hindered_is_told_at_any_time(holds):
    tap = Tap()
    tap.hindrance = Hindrance("disk full", "run-1.mcap: No space left on device", holds)
    reason = ("disk-full", "run-1.mcap: No space left on device", "ready" if holds else None)
    async with idle() as vm, anyio.create_task_group() as tasks:
        server = BridgeServer(vm, EchoHandler(), taps=[tap])
        assert told(server)[1:] == [reason]
        tasks.start_soon(consume, server)
        await until(lambda: told(server) == [reason])
        tap.hindrance = None
        assert told(server) == []
        server.stop()
