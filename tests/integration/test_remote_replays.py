"""Recordings as the guests of agents: played to their end, and as a load."""

import anyio
import pytest
from patience import HUNG
from remote_parts import carry, served

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    method,
    open_backend,
)
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording import Recorder, RecordingReader
from vmibridge.recording.replay.load import LoadBackend, LoadFigures, LoadOptions
from vmibridge.recording.traps import recorded_traps
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio
MAGIC = 0x1234_5678


class Probe(BridgeHandler[int]):
    MAGIC = MAGIC
    REQUEST = 1

    def __init__(self, more=0):
        self.more = more
        self.let_go = anyio.Event()

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(packet.value1 + 1 + self.more)

    @method(2)
    async def read(self, vmi, packet):
        data = await vmi.memory.read(0x1000, 4)
        await vmi.memory.write(0x1000, data[::-1])
        return BridgeResponse(sum(data))

    @method(3, soft_timeout=0.02)
    async def linger(self, vmi, packet):
        await self.let_go.wait()
        return BridgeResponse(9)


class Prompt(Probe):
    """Answers at once, and tells no guest to wait on a machine of any load."""

    name = "probe"

    @method(3)
    async def linger(self, vmi, packet):
        return BridgeResponse(9)


def ask(code, value=0):
    return BridgePacket(MAGIC, 1, code, value)


@pytest.fixture
async def path(tmp_path):
    """Two vCPUs of a VM; the first is told to wait, and asks again."""
    path = tmp_path / "run.mcap"
    handler = Probe()

    async def guest(vm):
        async def first():
            while (await vm.call(ask(3))).rax == 1:
                handler.let_go.set()

        async def second():
            for value in range(20):
                await vm.call(ask(1, value), vcpu=1)
                await vm.call(ask(2), vcpu=1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            tasks.start_soon(second)

    async with Recorder(path) as recorder, FakeGuest(guest, memory={0x1000: b"abcd"}) as vm:
        async for _ in BridgeServer([vm], lambda _: Bridge(handler), taps=[recorder]).run():
            pass
    return path


async def carried(url, backend, handler):
    """How its vCPUs ended, the outcomes at the server, and the counts of the agent."""
    outcomes = []

    async def on_outcome(outcome):
        outcomes.append(outcome)

    with anyio.fail_after(HUNG):
        async with served(url, handler, on_outcome=on_outcome) as server:
            agent, end = await carry(backend, url)
            while server.vms:
                await anyio.sleep(0.001)
    return end.vcpus, outcomes, agent.counts


@pytest.mark.parametrize("order", ["recorded", "vcpu"])
async def test_a_recording_is_played_to_its_end(path, tmp_path, order):
    handler = Prompt()
    backend = open_backend(f"replay:{path}?order={order}")
    vcpus, outcomes, counts = await carried(f"unix:{tmp_path}/s.sock", backend, handler)
    assert [(each.vcpu, each.reason) for each in vcpus] == [(0, "halted"), (1, "halted")]
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [OutcomeKind.HANDLED] * 41, kinds
    assert (counts.traps, counts.answered, counts.own) == (41, 41, 0)
    result = backend.result
    assert (result.compared, result.different, result.unchecked) == (41, 0, {})


async def test_what_a_server_elsewhere_answers_is_compared(path, tmp_path):
    handler = Prompt(more=1)
    backend = open_backend(f"replay:{path}")
    await carried(f"unix:{tmp_path}/s.sock", backend, handler)
    assert (backend.result.compared, backend.result.different) == (41, 20)
    assert [each.field for each in backend.result.first.fields] == ["value1"]


async def test_one_that_is_told_to_wait_asks_again(path, tmp_path):
    handler = Probe()
    backend = open_backend(f"replay:{path}")
    waits = 0

    async def on_outcome(outcome):
        nonlocal waits
        waits += outcome.kind is OutcomeKind.WAITING
        if waits == 3:
            handler.let_go.set()

    url = f"unix:{tmp_path}/s.sock"
    with anyio.fail_after(HUNG):
        async with served(url, handler, on_outcome=on_outcome):
            await carry(backend, url)
    assert waits >= 3
    assert (backend.result.compared, backend.result.different) == (41, 0)


async def test_what_comes_behind_a_retry_that_was_made_up_is_answered(tmp_path):
    path, handler = tmp_path / "run.mcap", Prompt()

    async def guest(vm):
        await vm.call(ask(3))
        for value in range(20):
            await vm.call(ask(1, value))

    async with Recorder(path) as recorder, FakeGuest(guest) as vm:
        async for _ in BridgeServer([vm], lambda _: Bridge(handler), taps=[recorder]).run():
            pass
    # Slower now: it is told to wait, as it was not when it was recorded.
    slower = Probe()
    waits = 0

    async def on_outcome(outcome):
        nonlocal waits
        waits += outcome.kind is OutcomeKind.WAITING
        if waits == 3:
            slower.let_go.set()

    backend = open_backend(f"replay:{path}?loop=2")
    url = f"unix:{tmp_path}/s.sock"
    with anyio.fail_after(HUNG):
        async with served(url, slower, on_outcome=on_outcome):
            agent, _ = await carry(backend, url)
    assert waits >= 3
    assert (backend.result.compared, backend.result.different) == (42, 0)
    assert agent.counts.answered == agent.counts.traps == 42 + waits


async def test_a_load_is_played_again_and_again_with_figures(path, tmp_path):
    handler = Prompt()
    backend = open_backend(f"replay:{path}?loop=3")
    _, outcomes, counts = await carried(f"unix:{tmp_path}/s.sock", backend, handler)
    assert (counts.traps, counts.answered) == (123, 123)
    seqs = [outcome.event.seq for outcome in outcomes]
    assert len(set(seqs)) == 123
    load = LoadFigures.sum_up([backend])
    assert (load.traps, load.compared, load.different) == (123, 123, 0)
    assert 0 <= load.p50_ms <= load.p90_ms <= load.p99_ms <= load.max_ms
    assert load.rate == pytest.approx(load.traps / load.seconds, rel=0.01)


async def test_a_load_in_this_process_is_a_guest_like_any_other(path, tmp_path):
    again = tmp_path / "again.mcap"
    copies = open_backend(f"replay:{path}?loop=2&copies=3", vm="web").copies()
    assert [backend.vm for backend in copies] == ["web", "web-2", "web-3"]
    async with Recorder(again) as recorder, copies[0], copies[1], copies[2]:
        async for _ in BridgeServer(copies, lambda _: Bridge(Prompt()), taps=[recorder]).run():
            pass
    assert [backend.result.compared for backend in copies] == [82] * 3
    assert [backend.result.different for backend in copies] == [0] * 3
    with RecordingReader(again) as reader:
        keys = [(each.event.vm, each.event.seq) for each in recorded_traps(reader.messages())]
    assert len(keys) == len(set(keys)) == 3 * 82


@pytest.mark.parametrize("option", ["copies=0", "copies=1001", "loop=-1", "loop=x"])
async def test_an_option_out_of_range_is_told(path, option):
    with pytest.raises(ValueError, match=f"run.mcap: .*{option.partition('=')[0]}"):
        open_backend(f"replay:{path}?{option}")


async def test_a_load_without_traps_has_no_figures(path):
    load = LoadFigures.sum_up([LoadBackend(path, LoadOptions(loop=0))])
    assert (load.traps, load.rate, load.p99_ms) == (0, 0.0, 0.0)
