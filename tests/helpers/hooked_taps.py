"""Handlers that do one thing each, a tap that keeps what it is told, and a run to the end."""

import anyio
from patience import HUNG

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Registers,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.engine.taps import Tap

MAGIC, OTHER_MAGIC = 0x1234, 0x9999
MEMORY = {0x2000: bytes(range(16))}


class Steps(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.began = anyio.Event()
        self.go_on = anyio.Event()

    @method(1)
    async def copy(self, vmi, packet):
        await vmi.memory.write_physical(0x2008, await vmi.memory.read_physical(0x2000, 8))
        return BridgeResponse(packet.value1 + 1)

    @method(2)
    async def linger(self, vmi, packet):
        self.began.set()
        await self.go_on.wait()
        return BridgeResponse(2)

    @method(3, soft_timeout=0.005)
    async def slow(self, vmi, packet):
        await self.go_on.wait()
        return BridgeResponse(3)

    @method(4)
    async def end_slow(self, vmi, packet):
        self.go_on.set()
        return BridgeResponse(4)


COPY, LINGER, SLOW, END_SLOW = (BridgePacket(MAGIC, 1, code) for code in (1, 2, 3, 4))
NATIVE = BridgePacket(OTHER_MAGIC, 1, 1)


class Hooked(Tap):
    """Keeps what it is told, by the hooks and by the other calls."""

    def __init__(self):
        self.calls = []
        self.begun = []
        self.session = []
        self.missed = []

    def begin(self, vm, bridge, settings, stop):
        self.calls.append("begin")

    def trap(self, event):
        self.calls.append(("trap", event.seq))

    def retried(self, event, first):
        self.calls.append(("retried", event.seq, first))

    def read(self, event, address, size, data, error):
        self.calls.append(("read", event.seq))

    def wrote(self, event, address, data, error):
        self.calls.append(("wrote", event.seq))

    def answered(self, outcome):
        self.calls.append(("answered", outcome.event.seq, outcome.kind.value, outcome.retry_of))

    def end(self, vm, summary):
        self.calls.append("end")

    def handler_began(self, began):
        self.calls.append(("began", began.event.seq, began.handler, began.method))
        self.begun.append(began)

    def ran_natively(self, event, why):
        self.calls.append(("native", event.seq, why))

    def session_event(self, event):
        self.calls.append(("session", event.kind.value))
        self.session.append(event)

    def tap_lost(self, vm, tap, error):
        self.calls.append(("lost", type(tap).__name__, str(error)))

    def missed_traps(self, vm, count):
        self.missed.append((vm, count))


async def serve(backend, target, *taps, **options):
    """Run to the end: the outcomes."""
    bridge = target if isinstance(target, Bridge) else Bridge(target)
    async with backend:
        with anyio.fail_after(HUNG):
            return [
                each async for each in BridgeServer(backend, bridge, taps=taps, **options).run()
            ]


def vmcall(seq, vcpu=0, packet=COPY):
    registers = Registers(rcx=packet.magic, rdx=packet.request | packet.method << 16)
    return TrapEvent(seq, TrapReason.VMCALL, registers, "fake", vcpu, length=3)
