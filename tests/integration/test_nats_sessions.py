"""What taps are told of agents on NATS, where nobody hangs up: who says nothing is lost."""

from contextlib import asynccontextmanager

import anyio
from nats_parts import ON_ASYNCIO, Work, ask, nats_server
from patience import HUNG
from remote_parts import carry, served
from waiting import until

from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentLimits

pytestmark = ON_ASYNCIO


class Watch(Tap):
    def __init__(self):
        self.calls = []
        self.outcomes = 0

    def answered(self, outcome):
        self.outcomes += 1

    def session_event(self, event):
        self.calls.append((event.vm, event.kind.value, event.peer))

    def end(self, vm, summary):
        self.calls.append("end")


@asynccontextmanager
async def lost_in_a_trap(tmp_path, watch, work, guest, silence):
    """A NATS that has stopped, with a trap at its handler whose agent is lost; then to the end."""
    with nats_server(tmp_path) as nats, anyio.fail_after(HUNG):
        limits, settings = AgentLimits(silence=silence), ServerSettings(timeout=3600)
        async with (
            served(nats.url, work, taps=lambda _: [watch], limits=limits, settings=settings),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(carry, FakeGuest(guest, vm="web"), nats.url)
            await until(lambda: work.asked)
            nats.stop()
            await until(lambda: len(watch.calls) == 2)
            yield nats
            await until(lambda: watch.calls[-1] == "end")


async def test_one_that_loses_nats_is_lost_and_is_back_when_it_is_heard_again(tmp_path):
    watch, work = Watch(), Work()

    async def guest(vm):
        assert (await vm.call(ask(5, 1))).rax == 2
        assert (await vm.call(ask(1, 1))).rax == 2

    async with lost_in_a_trap(tmp_path, watch, work, guest, silence=3.0) as nats:
        nats.start()
        await until(lambda: len(watch.calls) == 3)
        work.go_on.set()
    kinds = [each[1] for each in watch.calls[:-1]]
    assert kinds[:3] == ["connected", "lost", "back"]
    assert kinds[-1] == "ended"
    # It may be quiet for as long as that more than once.
    assert kinds[1:-1] == ["lost", "back"] * ((len(kinds) - 2) // 2)
    assert {(vm, peer) for vm, _, peer in watch.calls[:-1]} == {("web", "nats")}


async def test_an_answer_that_was_given_while_nobody_was_heard_comes_when_its_agent_is(tmp_path):
    watch, work = Watch(), Work()

    async def guest(vm):
        assert (await vm.call(ask(5, 1))).rax == 2

    async with lost_in_a_trap(tmp_path, watch, work, guest, silence=1.0) as nats:
        work.go_on.set()
        await until(lambda: watch.outcomes == 1)
        nats.start()
    assert [each[1] for each in watch.calls[:3]] == ["connected", "lost", "back"]
