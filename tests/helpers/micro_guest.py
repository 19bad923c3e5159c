"""What `guests/micro.asm` asks, and the handler that answers it."""

from collections import Counter

import anyio
import anyio.lowlevel
from base_handlers import StandardHandler

from vmibridge import BridgeResponse, method

CPUID, VMCALL, VMMCALL, ALL = 1, 2, 3, 4
"""HOW it calls."""
INVERT, REVERSE, HOLD, SLOW = 1, 2, 3, 4
"""METHOD."""
ALL_RIGHT, NOT_ANSWERED = 33, 35
"""Exit statuses of QEMU."""
ENDLESS = 2_000_000_000
MASK64 = (1 << 64) - 1


class Work(StandardHandler):
    """Answers as the guest expects, and knows what it was asked."""

    def __init__(self):
        self.calls = Counter()
        """Of each vCPU."""
        self.where = set()
        """Instruction, its length, width and ring."""
        self.begun = anyio.Event()
        """A vCPU has made a hundred calls, or one that waits."""
        self.again = anyio.Event()
        """The guest has begun anew."""
        self.end = anyio.Event()
        """Lets go of the slow ones."""
        self.at_hundred = anyio.lowlevel.checkpoint

    @method(INVERT)
    async def invert(self, vmi, packet):
        event = vmi.event
        self.where.add((event.reason.value, event.length, event.width, event.ring))
        self.calls[vmi.vcpu] += 1
        if self.calls[vmi.vcpu] == 100:
            self.begun.set()
            await self.at_hundred()
        elif self.calls[vmi.vcpu] > 100 and not packet.value1:
            self.again.set()
        return BridgeResponse(~packet.value1 & MASK64)

    @method(REVERSE)
    async def reverse(self, vmi, packet):
        text = await vmi.memory.read(packet.value2, packet.value3)
        assert text == b"hello to guest!!"
        await vmi.memory.write(packet.value2 + 16, text[13:5:-1])
        return BridgeResponse(~packet.value1 & MASK64)

    # The run ends when it has ended, or its deadline has passed.
    @method(HOLD, timeout=1)
    async def hold(self, vmi, packet):
        self.begun.set()
        await anyio.sleep_forever()

    @method(SLOW)
    async def slow(self, vmi, packet):
        self.begun.set()
        await self.end.wait()
        return BridgeResponse(~packet.value1 & MASK64)


class OfAnother(Work):
    MAGIC = 0x1234_5678
