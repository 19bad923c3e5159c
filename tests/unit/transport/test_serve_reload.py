"""The server of agents: handlers that are loaded anew."""

import pytest
from remote_parts import Echo, FakeAgent, Versioned, frame_of, talking_to, trap

from vmibridge.engine.settings import ServerSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestReload:
    async def test_new_traps_go_to_the_new_handlers_and_old_ones_end_with_the_old(self, url):
        old, new = Versioned(1), Versioned(2)
        async with talking_to(url, old) as (server, agent):
            agent.post(frame_of(trap(1)))
            await old.began.wait()
            assert await server.reload(lambda _: new) == 1
            agent.post(frame_of(trap(2, vcpu=1, code=5)))
            answer = await agent.next()
            assert (answer.seq, answer.rax) == (2, 2)
            old.go_on.set()
            assert (await agent.next()).rax == 7
            async with FakeAgent.connected(url) as other:
                await other.hello(session=b"t" * 16, vm="other")
        assert (old.runs, new.runs) == (1, 0)

    async def test_a_result_that_is_waited_for_comes_of_the_old_ones(self, url):
        old, new = Versioned(1), Versioned(2)
        settings = ServerSettings(soft_timeout=0.02)
        async with talking_to(url, old, settings=settings) as (server, agent):
            agent.post(frame_of(trap(1)))
            assert (await agent.next()).rax == 1  # WAIT
            await server.reload(lambda _: new)
            old.go_on.set()
            agent.post(frame_of(trap(2, code=5)))
            assert (await agent.next()).rax == 2
            agent.post(frame_of(trap(3)))
            assert (await agent.next()).rax == 7
        assert (old.runs, new.runs) == (1, 0)

    async def test_handlers_that_cannot_be_made_or_entered_change_nothing(self, url, caplog):
        class Broken(Echo):
            async def __aenter__(self):
                raise RuntimeError("no database")

        def fails(vm):
            raise RuntimeError("no such module")

        async with talking_to(url, Versioned(1)) as (server, agent):
            for wrong in (fails, lambda _: Broken()):
                assert await server.reload(wrong) == 0
            agent.post(frame_of(trap(1, code=5)))
            assert (await agent.next()).rax == 1
        assert "no database" in caplog.text
        assert "no such module" in caplog.text

    async def test_magics_that_the_vm_does_not_trap_yet_are_told(self, url, caplog):
        class Other(Echo):
            MAGIC = 0x1234

        async with talking_to(url, Versioned(1)) as (server, _):
            await server.reload(lambda _: Other())
        assert "once the VM restarts" in caplog.text
