"""What agents and servers on NATS say of their health, on a real one."""

from contextlib import asynccontextmanager

import anyio
from nats_parts import ON_ASYNCIO, Work
from remote_parts import served
from waiting import until

from vmibridge.testing import FakeGuest
from vmibridge.transport import Agent

pytestmark = ON_ASYNCIO

SILENCE = 0.6
"""Seconds; servers are asked three times in it whether they are there."""


@asynccontextmanager
async def idle_agent(url):
    """The agent of a guest that asks for nothing."""

    async def guest(_):
        await anyio.sleep_forever()

    async with FakeGuest(guest, vm="web") as vm, anyio.create_task_group() as tasks:
        agent = Agent(vm, url, silence=SILENCE, longest_pause=0.1)
        tasks.start_soon(agent.run)
        yield agent
        tasks.cancel_scope.cancel()


def told(part):
    return [(each.code, each.text.rpartition(": ")[2], each.fails) for each in part.health()]


NO_SERVER = [("server-unreachable", "no server is heard on this NATS", "ready")]
NO_NATS = [("server-unreachable", "NATS is not there", "ready")]


async def test_an_idle_agent_knows_whether_a_server_is_there(nats):
    """It sends no trap by which it would find out."""
    async with idle_agent(nats.url) as agent:
        async with served(nats.url, Work()):
            await until(lambda: not told(agent))
        await until(lambda: told(agent) == NO_SERVER)
        async with served(nats.url, Work()):
            await until(lambda: not told(agent))


async def test_an_agent_that_never_had_a_server_says_why(nats):
    async with idle_agent(nats.url) as agent:
        reason = [("server-unreachable", "no server listens on this NATS", "ready")]
        await until(lambda: told(agent) == reason)


async def test_a_nats_that_is_gone_is_told_by_both_ends_until_it_is_back(nats):
    async with served(nats.url, Work()) as server, idle_agent(nats.url) as agent:
        await until(lambda: not told(agent) and not told(server))
        nats.stop()
        lost = [("nats-unreachable", "the connection is lost", "ready")]
        await until(lambda: told(agent) == NO_NATS and told(server) == lost)
        nats.start()
        await until(lambda: not told(agent) and not told(server))
