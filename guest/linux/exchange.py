"""What the programs of the Linux guest call, in user space and in the kernel (`exchange.h`).

| method | in | out |
|---|---|---|
| 0x0001 INVERT | value1, value2 | value1: value1 inverted; value2: the sum of both |
| 0x0002 REVERSE | value1: address, value2: size, at most 64 KiB | value1: how many bytes |
| 0x0003 JOB | value1; value2 counts the attempts | value1: value1 inverted, after a while |

REVERSE reads the bytes, and writes them right behind, the last one first; 0 says that it could not.
"""

import anyio

from vmibridge import (
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    method,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

MASK = (1 << 64) - 1
MAX_SIZE = 64 << 10
JOB_SECONDS = 0.1


class Exchange(BridgeHandler[str]):
    """Answers what a guest can check; its output says what it did."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0200
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    @method(0x0001)
    async def invert(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Answer with value1 inverted, and the sum of value1 and value2."""
        return BridgeResponse(~packet.value1 & MASK, (packet.value1 + packet.value2) & MASK)

    @method(0x0002)
    async def reverse(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Write the bytes of a buffer behind it, the last one first."""
        size = packet.value2
        if size > MAX_SIZE:
            return BridgeResponse(0)
        try:
            data = await vmi.memory.read(packet.value1, size)
            await vmi.memory.write(packet.value1 + size, data[::-1])
        except GuestMemoryError:
            return BridgeResponse(0)
        return BridgeResponse(size, output=f"{size} bytes at {packet.value1:#x}")

    @method(0x0003, soft_timeout=0.02, retry_values=(1,))
    async def job(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Take longer than a vCPU should wait."""
        await anyio.sleep(JOB_SECONDS)
        return BridgeResponse(~packet.value1 & MASK, output="a job")
