"""A network that fails all the time: each trap is answered once, and no handler runs twice.

Between the agent and the server stands a proxy that delays, cuts in the middle of a frame,
hangs up in one direction, loses what was on its way, and reorders connections: the server sees
the last bytes of one, and its end, when the one that follows is at work.
"""

import random

import anyio
import pytest
from patience import HUNG
from remote_parts import AT, Adds, Late, Proxy, served

from vmibridge import BridgePacket, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest
from vmibridge.transport import Agent

pytestmark = pytest.mark.anyio
VCPUS = 16
HELLO_HAS = b"vmibridge"


class Guest(FakeGuest):
    """Counts how often each trap is resumed."""

    def __init__(self, guest):
        super().__init__(guest, memory={AT: bytes(8 * VCPUS)})
        self.resumed = []
        self.counted = [0] * VCPUS

    async def resume(self, event, writes):
        self.resumed.append(event.seq)
        await super().resume(event, writes)


def make_guest(traps, seed):
    random_ = random.Random(seed)

    async def vcpu(vm, number):
        for value in range(traps // VCPUS):
            code = random_.choices([1, 2, 3], [8, 1, 1])[0]
            vm.counted[number] += code == 3
            packet = BridgePacket(STANDARD_MAGIC, 0x0100, code, value)
            answer = await vm.call(packet, vcpu=number)
            assert answer.rax == value + 1

    async def guest(vm):
        async with anyio.create_task_group() as vcpus:
            for number in range(VCPUS):
                vcpus.start_soon(vcpu, vm, number)

    return Guest(guest)


def fates(seed, *, every):
    """One piece in `every` is the last of its connection, of which a third are reordered with
    the next, and so is one HELLO in five; some pieces come late."""
    random_ = random.Random(seed)

    def fate(data):
        lost = random_.random() < 1 / every
        if random_.random() < (1 / 5 if HELLO_HAS in data else lost / 3):
            # With the next HELLO, with its WELCOME, or when traps have passed.
            return Late(random_.randrange(8))
        if lost:
            return random_.randrange(len(data))
        return 0.002 if random_.random() < 0.01 else None

    return fate


async def carry_through(tmp_path, traps, *, every=60, seed=7):
    handler = Adds()
    vm = make_guest(traps, seed)
    there, here = tmp_path / "there.sock", tmp_path / "here.sock"
    proxy = Proxy(here, there, fates(seed, every=every))
    settings = ServerSettings(timeout=3600)
    ended = []

    async def on_end(name, summary, counts):
        ended.append((summary, counts))

    async with (
        served(f"unix:{there}", handler, settings=settings, on_end=on_end) as server,
        proxy.running(),
    ):
        async with vm:
            agent = Agent(vm, f"unix:{here}", longest_pause=0.01)
            end = await agent.run()
        with anyio.fail_after(HUNG):
            while server.vms:
                await anyio.sleep(0.001)
    count = traps // VCPUS * VCPUS
    assert not end.failed
    # Each trap: resumed once, run once, and the right answer (which the guest checks).
    assert sorted(vm.resumed) == list(range(1, count + 1))
    assert sorted(handler.asked) == list(range(1, count + 1))
    memory = vm.memory[AT]
    counters = [int.from_bytes(memory[at : at + 8], "little") for at in range(0, len(memory), 8)]
    assert counters == vm.counted
    ((summary, counts),) = ended
    assert summary.total == count
    assert (agent.counts.own, counts["refused"]) == (0, 0)
    return agent, proxy, counts


@pytest.mark.no_cover
async def test_5_000_traps_come_through_and_each_is_answered_once(tmp_path):
    agent, proxy, _ = await carry_through(tmp_path, 5_000)
    assert proxy.cuts >= 5
    assert proxy.reordered >= 3
    assert agent.counts.connections >= 5
    assert agent.counts.sent_again > 0


@pytest.mark.slow
async def test_100_000_traps_come_through_and_each_is_answered_once(tmp_path):
    agent, proxy, counts = await carry_through(tmp_path, 100_000, every=100)
    assert proxy.reordered >= 30
    assert agent.counts.connections >= 100
    assert counts["repeated"] > 0


async def test_a_network_that_fails_all_the_time_is_come_through_too(tmp_path):
    await carry_through(tmp_path, 320, every=4)


async def test_a_server_that_is_started_anew_refuses_what_may_have_run(tmp_path, caplog):
    """The guest sees which: it gets the fallback, and asks again."""
    url = f"unix:{tmp_path / 'x.sock'}"
    ran, refused, answers = [], [], []

    class Slow(Adds):
        @method(1)
        async def add(self, vmi, packet):
            ran.append(packet.value1)
            began.set()
            await anyio.sleep_forever()

    began = anyio.Event()

    async def guest(vm):
        for value in (1, 2):
            answer = await vm.call(BridgePacket(STANDARD_MAGIC, 0x0100, 1, value))
            answers.append(answer.rax)

    async def on_end(name, summary, counts):
        refused.append(counts["refused"])

    settings = ServerSettings(timeout=3600, fallback=BridgeResponse(value1=0xBAD), stop_timeout=0.1)
    async with anyio.create_task_group() as tasks, FakeGuest(guest) as vm:
        agent = Agent(vm, url, longest_pause=0.01)

        class Lost(Exception):
            pass

        try:
            async with served(url, Slow(), settings=settings) as server:
                tasks.start_soon(agent.run)
                await began.wait()
                # As if its machine had lost power: nothing is sent any more.
                for connection in list(server._listener._connections):
                    connection._plain.clear()
                    connection.close()
                server._listener.close()
                next(iter(server._vms.values())).session.link = None
                raise Lost
        except* Lost:
            pass
        async with served(url, Adds(), settings=settings, on_end=on_end) as server:
            with anyio.fail_after(HUNG):
                while len(answers) < 2 or server.vms:
                    await anyio.sleep(0.001)
    assert ran == [1]
    assert answers == [0xBAD, 3]
    assert refused == [1]
    assert "it may have run there" in caplog.text
