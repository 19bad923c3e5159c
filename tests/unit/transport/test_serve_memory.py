"""The server of agents: guest memory, which it asks the agent for."""

import pytest
from remote_parts import Steps, frame_of, talking_to, trap
from server_stage import welcome

from vmibridge.transport.wire import Memory

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestMemory:
    async def test_it_is_asked_of_the_agent(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=0x5000 code=3
                <- read 1 1 0x5000 4
                -> memory 8 "late"
                -> memory 1 "abcd"
                <- answer 1 rax=0x64636261
            """)

    @pytest.mark.parametrize("reply", ['error="not mapped"', '"abc"'])
    async def test_what_cannot_be_read_is_an_error_of_the_handler(self, url, reply):
        async with welcome(url) as stage:
            await stage.play(f"""
                -> trap 1 value=0x5000 code=3
                <- read 1 1 0x5000 4
                -> memory 1 {reply}
                <- answer 1 rax=0xbad
            """)

    async def test_it_is_asked_again_over_the_next_connection(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=0x5000 code=3
                <- read 1 1 0x5000 4
                !! hangs-up
                !! connects again
                again -> hello
                again <- welcome ...
                again <- read 1 1 0x5000 4
                again -> trap 1 value=0x5000 code=3
                again -> memory 1 "abcd"
                again <- answer 1 rax=0x64636261
            """)

    async def test_what_travelled_with_the_trap_is_not_asked_for(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=0x5002 code=3 memory="0123456789"
                <- answer 1 rax=0x35343332
            """)

    async def test_after_a_write_it_is(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=0x5002 code=4 memory="0123456789"
                <- write 1 1 0x5002 "abcd"
                -> memory 1
                <- read 2 1 0x5002 4
                -> memory 2 "abcd"
                <- answer 1 rax=0x64636261
            """)

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
