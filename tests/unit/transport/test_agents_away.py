"""A VM whose agent is away is kept for a while, and then given up."""

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.server.away import give_up_agents
from vmibridge.transport.session import Session
from vmibridge.transport.wire import Hello

pytestmark = pytest.mark.anyio


class FakeLink:
    def post(self, frame, *, later=False): ...

    def allow(self, size): ...

    def close(self): ...


def session(vm):
    hello = Hello(word=WORD, version=VERSION, oldest=VERSION, session=b"s" * 16, vm=vm)
    return Session(hello, "uid:0", vcpus=4)


async def test_an_agent_that_is_away_is_given_up_and_one_that_is_here_is_not():
    away, here = session("away"), session("here")
    here.attach(FakeLink())
    here.away_since -= 100
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(give_up_agents, lambda: [here, away], 0.02)
        with anyio.fail_after(10):
            await away.over.wait()
        assert not here.over.is_set()
        (end,) = away.guest.vcpus
        assert (end.reason, end.detail) == ("lost", "the agent did not come back within 0.02 s")
        tasks.cancel_scope.cancel()


async def test_the_time_counts_from_the_loss_of_the_last_connection():
    lost, link = session("lost"), FakeLink()
    lost.away_since -= 100
    lost.attach(link)
    lost.detach(link)
    lost.give_up_agent(50)
    assert not lost.over.is_set()
    lost.away_since -= 50
    lost.give_up_agent(50)
    assert lost.over.is_set()


async def test_vms_that_come_and_go_meanwhile_are_looked_at():
    vms = {name: session(name) for name in "ab"}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(give_up_agents, lambda: (vms[name] for name in vms), 0.02)
        with anyio.fail_after(10):
            while vms:
                for name in [name for name in vms if vms[name].over.is_set()]:
                    del vms[name]
                await checkpoint()
            later = vms["c"] = session("c")
            await later.over.wait()
        tasks.cancel_scope.cancel()
