"""Real guests in Unicorn whose handlers are at the other end of a connection."""

import anyio
import anyio.to_thread
import pytest
from base_handlers import StandardHandler
from patience import HUNG
from remote_parts import Certificates, Echo, carry, served

from vmibridge import BridgeResponse, method, open_backend
from vmibridge.bridge.contract import GuestRead
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import Agent

pytestmark = pytest.mark.anyio
CPUID, VMCALL, VMMCALL = 1, 2, 3
PASSED = 0x600D


@pytest.fixture(params=["unix", "tcp", "tls"])
def ends(request, tmp_path):
    """The URL of the server, and a function that gives that of the agent once it listens."""
    if request.param == "unix":
        url = f"unix:{tmp_path / 'remote.sock'}"
        return url, lambda _: url
    if request.param == "tcp":
        return "tcp:127.0.0.1:0", lambda server: f"tcp:127.0.0.1:{server.ports[0]}"
    made = Certificates(tmp_path)
    return (
        f"tls:127.0.0.1:0?{made.of('localhost')}&names=agent.example",
        lambda server: f"tls:127.0.0.1:{server.ports[0]}?{made.of('agent.example')}&name=localhost",
    )


async def run(ends, image, *handlers, options="", hear=None, **settings):
    """Run a guest to its end: how its vCPUs ended, its agent, and the outcomes. `hear` is called
    with each of these."""
    outcomes = []

    async def on_outcome(outcome):
        outcomes.append(outcome)
        if hear is not None:
            hear(outcome)

    there, here = ends
    with anyio.fail_after(HUNG):
        async with served(
            there, *handlers, settings=ServerSettings(**settings), on_outcome=on_outcome
        ) as server:
            backend = open_backend(f"unicorn:{image}{options}")
            agent, end = await carry(backend, here(server))
            while server.vms:
                await anyio.sleep(0.001)
    return end.vcpus, agent, outcomes


class TestGuests:
    @pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL])
    async def test_x64_code_gets_every_register_right(self, ends, build_guest, how):
        image = build_guest("calls", WIDTH=64, HOW=how, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(ends, image, Echo())
        assert vcpus[0].registers["rax"] == PASSED, vcpus[0]
        assert [each.kind for each in outcomes] == [OutcomeKind.HANDLED] * 51
        assert (agent.counts.traps, agent.counts.answered, agent.counts.own) == (51, 51, 0)

    async def test_x86_code_does_so_too(self, ends, build_guest):
        image = build_guest("calls", WIDTH=32, HOW=VMCALL, PAGING=2, COUNT=20)
        vcpus, _, _ = await run(ends, image, Echo(), options="?width=32")
        assert vcpus[0].registers["rax"] == PASSED

    async def test_vcpus_share_a_connection_and_keep_their_order(self, ends, build_guest):
        image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(ends, image, Echo(), options="?vcpus=4")
        assert [end.registers["rax"] for end in vcpus] == [PASSED] * 4
        assert agent.counts.connections == 1
        for vcpu in range(4):
            seqs = [each.event.seq for each in outcomes if each.event.vcpu == vcpu]
            assert len(seqs) == 51
            assert seqs == sorted(seqs)

    async def test_what_is_not_ours_never_leaves_the_machine(self, ends, build_guest):
        vcpus, agent, outcomes = await run(ends, build_guest("leaves"), Echo())
        assert vcpus[0].registers["rax"] == 10_000
        assert (agent.counts.traps, outcomes) == (0, [])


class Slow(StandardHandler):
    may_wait = True

    def __init__(self):
        self.runs = 0
        self.told = anyio.Event()

    def hear(self, outcome):
        """The guest has WAIT or an answer: let `work` end."""
        self.told.set()

    @method(1, timeout=3600)
    async def work(self, vmi, packet):
        self.runs += 1
        await self.told.wait()
        return BridgeResponse(value1=0x600D)

    @method(2)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


# Calls method 1 again for as long as it is told to wait; then method 2, and keeps its answer.
POLLING = """
again:
    mov ecx, 0x42494d56
    mov edx, 0x10100
    xor r8, r8
    vmcall
    cmp eax, 1
    je again
    mov ebx, eax
    mov rsi, rbx
    mov ecx, 0x42494d56
    mov edx, 0x20100
    vmcall
    hlt
"""


class TestTime:
    async def test_a_guest_is_told_to_wait_and_asks_again(self, ends, guest_code):
        handler = Slow()
        vcpus, agent, outcomes = await run(
            ends, guest_code(POLLING), handler, hear=handler.hear,
            soft_timeout=0.01, timeout=0.5, fallback=BridgeResponse(value1=0xBAD),
        )  # fmt: skip
        assert vcpus[0].registers["rsi"] == PASSED
        assert handler.runs == 1
        kinds = [each.kind for each in outcomes]
        assert kinds[0] is OutcomeKind.WAITING
        assert OutcomeKind.HANDLED in kinds
        assert agent.counts.own == 0

    async def test_the_agents_own_deadline_cancels_the_handler_elsewhere(self, ends, guest_code):
        code = "mov ecx, 0x42494d56\n mov edx, 0x20100\n vmcall\n hlt"
        outcomes, there_here = [], ends

        async def on_outcome(outcome):
            outcomes.append(outcome)

        there, here = there_here
        async with served(there, Slow(), on_outcome=on_outcome,
                          settings=ServerSettings(timeout=3600, fallback=BridgeResponse(0xBAD)),
                          ) as server:  # fmt: skip
            agent, end = await carry(
                open_backend(f"unicorn:{guest_code(code)}"), here(server), deadline=0.1
            )
            with anyio.fail_after(HUNG):
                while not outcomes:
                    await anyio.sleep(0.001)
        assert end.vcpus[0].registers["rax"] == 0xBAD
        # What the server says to the CANCEL may come before the agent has answered itself.
        assert agent.counts.own + agent.counts.answered == 1
        assert outcomes[0].kind is OutcomeKind.CANCELLED


class TestDeclaredReads:
    async def test_memory_that_travelled_is_not_asked_for(self, ends, build_guest):
        class Knows(Echo):
            reads = (GuestRead(1, 8, method=2),)

        asked = {}
        image = build_guest("calls", WIDTH=64, HOW=VMCALL, PAGING=1, COUNT=2)
        there, here = ends
        for handler in (Echo(), Knows()):
            reads = asked[type(handler)] = []
            async with served(there, handler) as server:
                backend = open_backend(f"unicorn:{image}")
                async with backend:
                    agent = Agent(backend, here(server))
                    do = agent._in_flight._accesses.do
                    agent._in_flight._accesses.do = lambda *what, do=do, reads=reads: (
                        reads.append(what[0]) or do(*what)
                    )
                    end = await agent.run()
            assert end.vcpus[0].registers["rax"] == PASSED
        # Five for the walk to the text and the text; the walk for the answer shares its tables.
        assert len(asked[Echo]) - len(asked[Knows]) >= 5


@pytest.mark.parametrize("other", ["asyncio", "uvloop", "trio"])
async def test_the_two_ends_may_run_on_different_loops(ends, build_guest, other):
    image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=50)
    there, here = ends

    async def agent(url):
        return await carry(open_backend(f"unicorn:{image}?vcpus=2"), url)

    def agent_in_a_thread(url):
        return anyio.run(
            agent, url,
            backend="trio" if other == "trio" else "asyncio",
            backend_options={"use_uvloop": True} if other == "uvloop" else {},
        )  # fmt: skip

    async with served(there, Echo()) as server:
        _, end = await anyio.to_thread.run_sync(agent_in_a_thread, here(server))
    assert [each.registers["rax"] for each in end.vcpus] == [PASSED] * 2
