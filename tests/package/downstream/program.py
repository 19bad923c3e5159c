"""A program of a user: every public way into vmibridge, with its types written down.

The tests check it with type checkers against the installed wheel, and run it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, assert_type

import anyio
import msgspec

import vmibridge
from vmibridge import (
    AddressRange,
    Bridge,
    BridgeContext,
    BridgeContract,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    Policy,
    Quota,
    Rate,
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
    VmiBridgeError,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3
from vmibridge.config import Config, HandlerFactory, load_handlers
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import HandlerBegan, Tap
from vmibridge.errors import BackendError, HandlerLoadError
from vmibridge.recording import (
    Difference,
    RecordedTrap,
    Recorder,
    RecordingReader,
    Replay,
    ReplayResult,
    RequestResult,
    recorded_traps,
)
from vmibridge.testing import FakeBackend, FakeGuest, FakeMemory, drive
from vmibridge.transport import Agent, AgentLimits, AgentServer, RemoteBackend
from vmibridge.vm.backend import Backend, SessionEvent, SessionEventKind
from vmibridge.vm.memory import MAX_ACCESS, GuestMemory


class Shout(BridgeHandler[str]):
    """A handler with methods and settings."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    timeout = 2.0

    class Settings(msgspec.Struct, frozen=True):
        longest: int = 4096

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or self.Settings()

    @method(0x0001, soft_timeout=0.5, wait=BridgeResponse(value1=int(Gate.WAIT)))
    async def shout(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str] | None:
        assert_type(vmi.memory, GuestMemory)
        assert_type(vmi.event, TrapEvent)
        if packet.value2 > min(self._settings.longest, MAX_ACCESS):
            return None
        try:
            text = await vmi.memory.read(packet.value1, packet.value2)
        except GuestMemoryError as error:
            return BridgeResponse(value1=error.address).with_output(error.reason)
        assert_type(text, bytes)
        await vmi.memory.write(packet.value1, text.upper())
        return BridgeResponse(value1=len(text)).with_output(text.decode())


class Count(Tap):
    """A tap of one's own."""

    def __init__(self) -> None:
        self.answered_traps = 0

    def answered(self, outcome: Outcome[Any]) -> None:
        assert_type(outcome.kind, OutcomeKind)
        self.answered_traps += 1

    def handler_began(self, began: HandlerBegan) -> None:
        assert_type(began.queued, int | None)

    def session_event(self, event: SessionEvent) -> None:
        assert_type(event.kind, SessionEventKind)


PACKET = BridgePacket(STANDARD_MAGIC, Shout.REQUEST, 0x0001, 0x1000, 5)


async def with_drive() -> Outcome[Any]:
    memory = FakeMemory({0x1000: b"hello"})
    outcome = await drive(Shout(Shout.Settings(longest=16)), PACKET, memory)
    assert_type(outcome.response, BridgeResponse[Any] | None)
    assert memory[0x1000] == b"HELLO"
    return outcome


async def guest(vm: FakeGuest) -> None:
    writes = await vm.call(PACKET, ring=3)
    assert_type(writes, RegisterWrites | None)
    assert writes is not None


async def with_server(file: Path) -> Summary:
    policy = Policy(
        rings=frozenset({0, 3}),
        instructions=(AddressRange(0, 1 << 32),),
        vm=Quota(requests=Rate(burst=10, rate=1.0)),
    )
    tap = Count()
    async with (
        FakeGuest(guest, memory={0x1000: b"hello"}) as backend,
        Recorder(file) as recorder,
    ):
        server = BridgeServer(
            backend, Bridge(Shout()), timeout=5.0, policy=policy, taps=[recorder, tap]
        )
        async with server.run() as run:
            async for outcome in run:
                assert_type(outcome, Outcome[Any])
                assert outcome.kind is OutcomeKind.HANDLED
        assert_type(server.summary, Summary)
    assert tap.answered_traps == 1
    return server.summary


def read_back(file: Path) -> list[RecordedTrap]:
    with RecordingReader(file) as reader:
        found = list(recorded_traps(reader.messages()))
    assert_type(found, list[RecordedTrap])
    return found


async def asked_again(file: Path) -> ReplayResult:
    async with Replay(file, Shout, requests=[0x0100, "shout"], vcpus=0, timeout=1.0) as replay:
        found = await replay.until(handler=Shout)
        assert_type(found, RequestResult)
        assert_type(replay.handler(Shout), Shout)
        async for request in replay:
            assert_type(request.difference, Difference | None)
        return await replay.run()


def remote_ends(
    url: str, backend: Backend, settings: ServerSettings
) -> tuple[Agent, AgentServer, RemoteBackend]:
    """The ends of a transport, made and not run."""
    limits = AgentLimits(sessions=4)
    return (
        Agent(backend, url, vm="web", deadline=1.0),
        AgentServer([url], lambda vm: Bridge(Shout()), settings=settings, limits=limits),
        RemoteBackend(url, vm="web", limits=limits),
    )


def configured(sources: list[str]) -> list[BridgeHandler[Any]]:
    config = Config("here", "[server]\ntimeout = 1.5\n")
    assert_type(config.server, ServerSettings)
    factory = HandlerFactory(sources, config)
    assert_type(factory("web"), Bridge)
    return load_handlers(sources, config)


async def main() -> None:
    trap = TrapEvent(1, TrapReason.CPUID, Registers(rax=1), vcpu=2)
    backends: list[Backend] = [FakeBackend([trap])]
    contract = Shout().contract
    assert_type(contract, BridgeContract)
    outcome = await with_drive()
    assert outcome.output == "hello"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.mcap"
        summary = await with_server(file)
        (recorded,) = read_back(file)
        replayed = await asked_again(file)
        remote_ends(f"unix:{folder}/vmi.sock", backends[0], ServerSettings(grace=0.5))
    assert summary.total == 1
    assert recorded.event.vcpu == 0
    assert (replayed.compared, replayed.different) == (1, 0)
    errors: list[VmiBridgeError] = []
    try:
        assert_type(open_backend("nothing:at-all"), Backend)
    except BackendError as error:
        errors.append(error)
    try:
        configured(["no_such_module.of_mine"])
    except HandlerLoadError as error:
        errors.append(error)
    assert len(errors) == 2
    sys.stdout.write(f"{Path(vmibridge.__file__).parent} {vmibridge.__version__}\n")


if __name__ == "__main__":
    anyio.run(main)
