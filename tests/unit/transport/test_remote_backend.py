"""One VM of an agent, as the backend of a server of one's own."""

import anyio
import pytest
from remote_parts import Echo, FakeAgent, carry, frame_of, trap

from vmibridge import BridgePacket, BridgeServer, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentLimits, RemoteBackend
from vmibridge.transport.wire import End

pytestmark = pytest.mark.anyio
MASK = (1 << 64) - 1


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class Runs(Tap):
    """Sees that the backend is about to run: a server that is stopped before has no guest."""

    def __init__(self):
        self.begun = anyio.Event()

    def begin(self, vm, bridge, settings, stop):
        self.begun.set()


async def all_outcomes(server):
    return [outcome async for outcome in server.run()]


class TestRemoteBackend:
    async def serve(self, url, handler, agents, **options):
        outcomes = []
        async with (
            anyio.create_task_group() as tasks,
            RemoteBackend(url, vm="web", **options) as backend,
        ):
            tasks.start_soon(agents, backend)
            server = BridgeServer(backend, handler)
            async for outcome in server.run():
                outcomes.append(outcome)
        return outcomes, server.summary

    async def test_it_is_the_vm_of_the_first_agent_that_comes(self, url):
        async def guest(vm):
            vm.answer = await vm.call(BridgePacket(STANDARD_MAGIC, 0x0100, 1, 5))

        vm = FakeGuest(guest)

        async def agents(_):
            await carry(vm, url)

        outcomes, summary = await self.serve(url, Echo(), agents)
        assert vm.answer.rax == ~5 & MASK
        assert outcomes[0].event.vm == "web"
        assert summary.guest.vcpus[0].reason == "halted"

    async def test_another_agent_is_refused(self, url):
        async def agents(_):
            async with FakeAgent.connected(url) as one, FakeAgent.connected(url) as two:
                await one.hello()
                told = await two.hello(session=b"t" * 16)
                assert "another agent" in told.why
                one.post(End())
                await one.next()

        await self.serve(url, Echo(), agents)

    async def test_one_that_stays_away_ends_the_run(self, url):
        async def agents(_):
            async with FakeAgent.connected(url) as agent:
                await agent.hello()

        limits = AgentLimits(keep=0.05)
        _, summary = await self.serve(url, Echo(), agents, limits=limits)
        assert summary.guest.vcpus[0].reason == "lost"

    async def test_a_stop_ends_it_whether_one_came_or_not(self, url):
        for come in (False, True):
            async with RemoteBackend(url) as backend:
                runs = Runs()
                server = BridgeServer(backend, Echo(), taps=[runs])
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(all_outcomes, server)
                    async with FakeAgent.connected(url) as agent:
                        if come:
                            await agent.hello()
                        await runs.begun.wait()
                        server.stop()
            assert all(end.reason == "stopped" for end in server.summary.guest.vcpus)

    async def test_memory_after_the_end_is_an_error(self, url):
        seen = []

        class Late(Echo):
            @method(1, timeout=5)
            async def invert(self, vmi, packet):
                began.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        seen.append(backend_.session.over.is_set())

        began = anyio.Event()

        async def agents(backend):
            nonlocal backend_
            backend_ = backend
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                agent.post(frame_of(trap(1)))
                await began.wait()
                agent.post(End())
                await agent.next()

        backend_ = None
        await self.serve(url, Late(), agents)
        assert seen == [True]
