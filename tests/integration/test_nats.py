"""Agents and servers that meet on a real NATS, with real guests in Unicorn and made ones."""

from itertools import chain

import anyio
import pytest
from nats_parts import (
    AT,
    ON_ASYNCIO,
    Guest,
    Work,
    ask,
    nats_server,
)
from patience import HUNG
from remote_parts import Echo, carry, served
from waiting import until

from vmibridge import (
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.status import Gate
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentServer, RemoteBackend
from vmibridge.transport.nats.subjects import partition_of

CPUID, VMCALL, VMMCALL = 1, 2, 3
PASSED = 0x600D
LONG = ServerSettings(timeout=3600)

pytestmark = ON_ASYNCIO


async def run(url, image, *handlers, options=""):
    outcomes = []

    async def on_outcome(outcome):
        outcomes.append(outcome)

    with anyio.fail_after(HUNG):
        async with served(url, *handlers, on_outcome=on_outcome) as server:
            agent, end = await carry(open_backend(f"unicorn:{image}{options}"), url)
            await until(lambda: not server.vms)
    return end.vcpus, agent, outcomes


class TestGuests:
    @pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL])
    async def test_x64_code_gets_every_register_and_its_memory_right(self, nats, build_guest, how):
        image = build_guest("calls", WIDTH=64, HOW=how, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(nats.url, image, Echo())
        assert vcpus[0].registers["rax"] == PASSED, vcpus[0]
        assert [each.kind for each in outcomes] == [OutcomeKind.HANDLED] * 51
        assert (agent.counts.traps, agent.counts.answered, agent.counts.own) == (51, 51, 0)

    async def test_x86_code_does_so_too(self, nats, build_guest):
        image = build_guest("calls", WIDTH=32, HOW=VMCALL, PAGING=2, COUNT=20)
        vcpus, _, _ = await run(nats.url, image, Echo(), options="?width=32")
        assert vcpus[0].registers["rax"] == PASSED

    async def test_vcpus_keep_their_order(self, nats, build_guest):
        image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(nats.url, image, Echo(), options="?vcpus=4")
        assert [end.registers["rax"] for end in vcpus] == [PASSED] * 4
        assert agent.counts.connections == 1
        for vcpu in range(4):
            seqs = [each.event.seq for each in outcomes if each.event.vcpu == vcpu]
            assert len(seqs) == 51
            assert seqs == sorted(seqs)

    async def test_what_is_not_ours_never_leaves_the_machine(self, nats, build_guest):
        vcpus, agent, outcomes = await run(nats.url, build_guest("leaves"), Echo())
        assert vcpus[0].registers["rax"] == 10_000
        assert (agent.counts.traps, outcomes) == (0, [])

    async def test_a_server_of_ones_own_takes_one_vm(self, nats, build_guest):
        image = build_guest("calls", WIDTH=64, HOW=VMCALL, PAGING=1, COUNT=5)
        ends = []

        async def agent():
            ends.append(await carry(open_backend(f"unicorn:{image}"), nats.url))

        async with RemoteBackend(nats.url) as backend, anyio.create_task_group() as tasks:
            tasks.start_soon(agent)
            kinds = [each.kind async for each in BridgeServer(backend, Echo()).run()]
        assert kinds == [OutcomeKind.HANDLED] * 6
        assert ends[0][1].vcpus[0].registers["rax"] == PASSED


class TestMemory:
    async def test_more_of_it_than_nats_takes_in_a_message_goes_in_parts(self, nats):
        size = 3 << 20
        data = bytes(range(256)) * (size // 256)

        async def guest(vm):
            assert (await vm.call(ask(4, AT, size))).rax == 1

        vm = FakeGuest(guest, memory={AT: data})
        async with served(nats.url, Work()):
            agent, _ = await carry(vm, nats.url)
        assert vm.memory.read(AT, size) == data.translate(bytes(range(255, -1, -1)))
        assert agent.counts.answered == 1


class TestSeveral:
    async def test_two_vms_share_one_server_and_each_has_handlers_of_its_own(self, nats):
        made = {}

        def handlers(vm):
            return made.setdefault(vm, Work())

        vms = [Guest(4, 50, vm=name) for name in ("web", "db.example *")]
        server = AgentServer([nats.url], handlers)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await server.listening.wait()
            async with anyio.create_task_group() as agents:
                for vm in vms:
                    agents.start_soon(carry, vm, nats.url)
            server.stop()
        for vm in vms:
            assert not vm.wrong
            assert sorted(made[vm.vm].asked) == sorted(vm.resumed) == list(range(1, 201))

    async def test_servers_share_the_traps_of_a_vm(self, nats):
        handlers = [Work() for _ in range(3)]
        vm = Guest(16, 40)
        async with (
            served(nats.url, handlers[0]),
            served(nats.url, handlers[1]),
            served(nats.url, handlers[2]),
        ):
            agent, _ = await carry(vm, nats.url)
        assert not vm.wrong
        assert sorted(chain.from_iterable(each.asked for each in handlers)) == list(range(1, 641))
        assert min(len(each.asked) for each in handlers) > 64
        assert (agent.counts.answered, agent.counts.own) == (640, 0)

    async def test_a_request_that_was_told_to_wait_is_asked_again_where_its_handler_is(self, nats):
        class Slow(BridgeHandler[None]):
            MAGIC = STANDARD_MAGIC
            REQUEST = 0x0100
            may_wait = True
            runs = 0

            @method(1)
            async def work(self, vmi, packet):
                Slow.runs += 1
                await anyio.sleep(0.1)
                return BridgeResponse(value1=PASSED)

        async def guest(vm):
            for _ in range(3):
                while (answer := await vm.call(ask(1))).rax == Gate.WAIT:
                    await anyio.sleep(0.005)
                assert answer.rax == PASSED

        settings = ServerSettings(soft_timeout=0.01)
        async with (
            served(nats.url, Slow(), settings=settings),
            served(nats.url, Slow(), settings=settings),
        ):
            await carry(FakeGuest(guest), nats.url)
        assert Slow.runs == 3

    async def test_a_server_that_stops_gives_its_traps_to_the_others(self, nats):
        first, second = Work(), Work()
        vm = Guest(8, 100)
        async with (
            served(nats.url, second),
            anyio.create_task_group() as tasks,
            served(nats.url, first) as server,
        ):
            tasks.start_soon(carry, vm, nats.url)
            await until(lambda: len(first.asked) > 50)
            server.stop()
            await until(lambda: not server.vms)
        assert not vm.wrong
        assert sorted(first.asked + second.asked) == list(range(1, 801))


class TestPinned:
    MAPPINGS = """
        mappings: {
            "vmibridge.*.*.*":
                "vmibridge-pinned.{{partition(3,1)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"
            "vmibridge.hello.*": "vmibridge-pinned.{{partition(3,1)}}.hello.{{wildcard(1)}}"
        }
    """

    @pytest.mark.parametrize("who", ["nats", "agent"])
    async def test_each_vm_has_one_server(self, tmp_path, who):
        names = [f"vm{number}" for number in range(9)]
        made = [{} for _ in range(3)]
        with nats_server(tmp_path, self.MAPPINGS if who == "nats" else "") as nats:
            servers = [
                AgentServer(
                    [f"{nats.url}?subject=vmibridge-pinned.{number}.>" if number
                     else f"{nats.url}?partition=0"],
                    lambda vm, mine=made[number]: mine.setdefault(vm, Work()),
                )
                for number in range(3)
            ]  # fmt: skip
            here = nats.url if who == "nats" else f"{nats.url}?partitions=3"
            async with anyio.create_task_group() as tasks:
                for server in servers:
                    tasks.start_soon(server.run)
                    await server.listening.wait()
                async with anyio.create_task_group() as agents:
                    for name in names:
                        agents.start_soon(carry, Guest(2, 10, vm=name), here)
                for server in servers:
                    server.stop()
        for name in names:
            asked = [len(mine[name].asked) if name in mine else 0 for mine in made]
            expected = [0, 0, 0]
            expected[partition_of(name, 3)] = 20
            assert asked == expected, name
