"""What handlers of many tests begin with."""

from typing import Any

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

MASK64 = (1 << 64) - 1


class StandardHandler(BridgeHandler[Any]):
    """The standard magic and stamps, and the request that most guests of the tests make."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4


class EchoHandler(StandardHandler):
    """What the guests of `calls.asm` expect."""

    @method(1)
    async def invert(self, vmi, packet):
        total = packet.value2 + packet.value3 + packet.value4 & MASK64
        return BridgeResponse(value1=~packet.value1 & MASK64, value2=total)

    @method(2)
    async def reverse(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, packet.value3 or 8)
        await vmi.memory.write(packet.value2, data[::-1])
        return BridgeResponse()


class HandlerWithLives(BridgeHandler[Any]):
    """Notes when it is entered and left, in `lives`."""

    def __init__(self):
        self.lives = []

    async def __aenter__(self):
        self.lives.append("entered")
        return self

    async def __aexit__(self, *error):
        self.lives.append("left")
