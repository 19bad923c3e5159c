"""A changed handler that needs another one out of its recorded turn: both go on."""

from functools import partial

import anyio
import pytest
from determinism_parts import MAGIC, ask, assert_same, record

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method


class InTurn(BridgeHandler[object]):
    """The second one begins when the first has ended."""

    MAGIC, REQUEST, serial = MAGIC, 1, True

    def __init__(self, pause):
        self.pause, self.has_begun = pause, anyio.Event()

    @method(1)
    async def first(self, vmi, packet):
        await anyio.sleep(self.pause)
        return BridgeResponse(value1=0x11)

    @method(2)
    async def second(self, vmi, packet):
        self.has_begun.set()
        return BridgeResponse(value1=await vmi.outside("number", self.fetch))

    async def fetch(self):
        await anyio.sleep(0.005)
        return 0x12


class Beside(BridgeHandler[object]):
    MAGIC, REQUEST = MAGIC, 2

    def __init__(self, what):
        self.what = what

    @method(1)
    async def third(self, vmi, packet):
        await self.what()
        return BridgeResponse(value1=0x13)


def bridge_of(*, changed):
    in_turn = InTurn(0.005 if changed else 0.02)
    what = in_turn.has_begun.wait if changed else partial(anyio.sleep, 0.01)
    return Bridge(in_turn, Beside(what))


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_one_that_has_begun_before_its_turn_is_not_waited_for_when_that_comes(tmp_path, loop):
    """It waits for a value that is recorded behind its turn, so it would for ever."""

    async def guest(vm):
        async with anyio.create_task_group() as vcpus:
            for vcpu, packet in enumerate([ask(1), ask(2), ask(1, request=2)]):
                vcpus.start_soon(partial(vm.call, packet, vcpu=vcpu))
                await anyio.sleep(0.001)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: bridge_of(changed=False), loop, virtual=True)
    assert assert_same(path, ["vm"], lambda _: bridge_of(changed=True), loop=loop) == 3
