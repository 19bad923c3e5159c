"""A handler that does what a packet says, and a server of a guest that is made up."""

import anyio

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.testing import FakeBackend

MAGIC = 0x1234_5678
ANSWER, WAIT, HANG, RAISE, REJECT, STUBBORN, CANCEL_ITSELF, READ = range(1, 9)


class Probe(BridgeHandler[str]):
    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747

    def __init__(self):
        self.running = 0
        self.most_running = 0
        self.seen = []
        self.unwound = anyio.Event()
        self.hanging = anyio.Event()
        self.release = anyio.Event()

    @method(ANSWER)
    async def answer(self, vmi, packet):
        self.seen.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output("now")

    @method(WAIT)
    async def wait_a_while(self, vmi, packet):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await anyio.sleep(0.002)
        self.running -= 1
        self.seen.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output("later")

    @method(HANG)
    async def hang(self, vmi, packet):
        self.running += 1
        if self.running == 4:
            self.hanging.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.unwound.set()

    @method(RAISE)
    async def fail(self, vmi, packet):
        await anyio.sleep(0)
        raise LookupError("on\npurpose")

    @method(REJECT)
    async def reject(self, vmi, packet):
        return None

    @method(STUBBORN)
    async def stubborn(self, vmi, packet):
        with anyio.CancelScope(shield=True):
            await self.release.wait()
        self.seen.append("unwound")
        return BridgeResponse(value1=0xBAD)

    @method(CANCEL_ITSELF)
    async def cancel_itself(self, vmi, packet):
        # As when something that it awaits was cancelled by others.
        await anyio.sleep(0)
        raise anyio.get_cancelled_exc_class() if packet.value1 else LookupError("no")

    @method(READ)
    async def read(self, vmi, packet):
        return BridgeResponse(value1=(await vmi.memory.read(packet.value1, 1))[0])


def trap(
    seq, code, *, vcpu=0, request=1, magic=MAGIC, value1=None, reason=TrapReason.VMCALL, **more
):
    selector = request | code << 16
    value1 = seq if value1 is None else value1
    if reason is TrapReason.CPUID:
        registers = Registers(rax=magic, rcx=selector, r8=value1, **more)
    else:
        registers = Registers(rcx=magic, rdx=selector, r8=value1, **more)
    length = 2 if reason is TrapReason.CPUID else 3
    return TrapEvent(seq, reason, registers, vcpu=vcpu, ip=0x1000, length=length)


def server_of(backend, bridge, **options):
    """A server that leaves handlers no grace at a stop: here most of them never end."""
    return BridgeServer(backend, bridge, **{"grace": 0.0, **options})


async def serve(events, *targets, backend=None, **options):
    backend = backend or FakeBackend(events)
    async with backend:
        server = server_of(backend, Bridge(*(targets or [Probe()])), **options)
        outcomes = [outcome async for outcome in server.run()]
    assert sorted(backend.writes) == sorted(event.seq for event in backend.events)
    return outcomes, backend, server


MOVED_ON = RegisterWrites(0x1003)
