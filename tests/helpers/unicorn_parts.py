"""Handlers for the guests of the tests on Unicorn, and how they are served."""

import anyio
import pytest
from base_handlers import EchoHandler

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3

CPUID, VMCALL, VMMCALL = 1, 2, 3
HOWS = [
    pytest.param(CPUID, id="cpuid"),
    pytest.param(VMCALL, id="vmcall"),
    pytest.param(VMMCALL, id="vmmcall"),
]
PASSED = 0x600D
MASK64 = (1 << 64) - 1


class Echo(EchoHandler):
    """What the guests of `calls.asm` and `rings.asm` expect."""

    @method(3)
    async def ring(self, vmi, packet):
        await anyio.sleep(0)
        return BridgeResponse(value1=packet.value1 << 8 | vmi.event.ring).with_output(
            vmi.event.width
        )


class Misbehaves(BridgeHandler[None]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0200
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3

    @method(1, timeout=0.05)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()

    @method(2)
    async def fail(self, vmi, packet):
        raise RuntimeError("as it was told to")

    @method(3, timeout=0.05)
    async def cancelled_in_mid_write(self, vmi, packet):
        await vmi.memory.write(0x200000, b"first")
        await anyio.sleep_forever()
        await vmi.memory.write(0x200000, b"never")

    @method(4)
    async def read_unmapped(self, vmi, packet):
        await vmi.memory.read(packet.value1, 4096)

    @method(5, timeout=0.05)
    async def block_in_a_thread(self, vmi, packet):
        await anyio.to_thread.run_sync(self.released.wait)

    def __init__(self):
        import threading

        self.released = threading.Event()


async def serve(spec, *handlers, **options):
    """Run a guest to its end: the outcomes, the summary, and the bytes at 2 MiB."""
    outcomes = []
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(*handlers), **options)
        async for outcome in server.run():
            outcomes.append(outcome)
        memory = bytes(backend._ram[0x200000:0x400000])
    return outcomes, server.summary, memory


def final(summary, vcpu=0):
    end = summary.guest.vcpus[vcpu]
    assert end.reason == "halted", end.detail
    return end.registers
