"""The server of agents: guest memory, which it asks the agent for."""

import pytest
from remote_parts import FakeAgent, Steps, frame_of, talking_to, trap

from vmibridge import BridgeResponse
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport.wire import Memory, Read

pytestmark = pytest.mark.anyio
FALLBACK = ServerSettings(fallback=BridgeResponse(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestMemory:
    async def test_it_is_asked_of_the_agent(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            asked = await agent.next()
            assert (asked.seq, asked.address, asked.size) == (1, 0x5000, 4)
            agent.post(Memory(asked.access + 7, b"late"))
            agent.post(Memory(asked.access, b"abcd"))
            assert (await agent.next()).rax == 4

    @pytest.mark.parametrize("reply", [{"error": "not mapped"}, {"data": b"abc"}])
    async def test_what_cannot_be_read_is_an_error_of_the_handler(self, url, reply):
        async with talking_to(url, Steps(), settings=FALLBACK) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            agent.post(Memory((await agent.next()).access, **reply))
            assert (await agent.next()).rax == 0xBAD

    async def test_it_is_asked_again_over_the_next_connection(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            asked = await agent.next()
            agent.connection.close()
            async with FakeAgent.connected(url) as again:
                await again.hello()
                assert await again.next() == asked
                again.post(frame_of(trap(1, value=0x5000, code=2)))
                again.post(Memory(asked.access, b"abcd"))
                assert (await again.next()).rax == 4

    async def test_what_travelled_with_the_trap_is_not_asked_for(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            frame = frame_of(trap(1, value=0x5002, code=2), memory=((0x5000, b"0123456789"),))
            agent.post(frame)
            assert (await agent.next()).rax == 4

    async def test_after_a_write_it_is(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            frame = frame_of(trap(1, value=0x5002, code=3), memory=((0x5000, b"0123456789"),))
            agent.post(frame)
            asked = await agent.next()
            assert (asked.address, asked.data) == (0x5002, b"abcd")
            agent.post(Memory(asked.access))
            asked = await agent.next()
            assert isinstance(asked, Read)
            agent.post(Memory(asked.access, b"abcd"))
            assert (await agent.next()).rax == 4

    async def test_a_large_read_comes_in_one_frame(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0, code=4)))
            asked = await agent.next()
            assert asked.size == 2 << 20
            agent.post(Memory(asked.access, bytes(asked.size)))
            await agent.connection.drain(10)
            assert (await agent.next()).rax == 2 << 20

    async def test_more_than_was_asked_for_loses_the_connection(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            agent.post(Memory((await agent.next()).access, bytes(2 << 20)))
            await agent.connection.drain(1)
            assert await agent.is_hung_up_on()
