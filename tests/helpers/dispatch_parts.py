"""Handlers and dispatchers that say which of them was asked, and packets to ask them."""

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.dispatch import Bridge, BridgeDispatch
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

MAGIC, OTHER_MAGIC, UNKNOWN_MAGIC = 0x4249_4D56, 0x5245_4854, 0xDEAD_BEEF
VMCALL, CPUID = TrapReason.VMCALL, TrapReason.CPUID


class Answering(BridgeHandler[str]):
    """Answers what its test tells it to, and counts how often it was asked."""

    def __init__(self, label="", *, magic=MAGIC, request=1, any_cpuid=False, answer="label"):
        self.label = label
        self.MAGIC = magic
        self.REQUEST = request
        self.ANY_CPUID = any_cpuid
        self.answer = answer
        self.asked = 0

    def __repr__(self):
        return f"<{self.label or hex(id(self))}>"

    async def handle(self, vmi, packet):
        self.asked += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer == "label":
            return BridgeResponse(packet.value1).with_output(self.label)
        return self.answer


class Deciding(BridgeDispatch):
    """A dispatcher of one's own: it decides for itself which requests it answers."""

    def __init__(self, *contracts, answers=()):
        self._contracts = contracts
        self._answers = answers
        self.asked = 0

    def contracts(self):
        return self._contracts

    async def dispatch(self, vmi, packet):
        self.asked += 1
        if packet.method in self._answers:
            return Outcome(OutcomeKind.HANDLED, packet, BridgeResponse(1, output=self), "deciding")
        return Outcome(OutcomeKind.UNMATCHED, packet)


def context(reason: TrapReason = VMCALL) -> BridgeContext:
    return BridgeContext(TrapEvent(1, reason, Registers(), length=3), FakeBackend())


def ask(magic: int = MAGIC, request: int = 1, method: int = 1, value1: int = 0) -> BridgePacket:
    return BridgePacket(magic, request, method, value1)


def targets(bridge: Bridge, packet: BridgePacket, reason: TrapReason = VMCALL) -> list:
    return [entry.target for entry in bridge.match(packet, reason)]


def overriding():
    class Overriding(BridgeHandler):
        REQUEST = 1

        async def handle(self, vmi, packet): ...

    return Overriding
