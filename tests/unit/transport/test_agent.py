"""The agent, against a server that is played: answers, deadlines, limits."""

import anyio
import pytest
from played_server import INCARNATIONS, PACKET, FakeServer, beside, guest_of, welcome
from remote_parts import trap

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import BackendError, BackendSpecError, ServerStateError
from vmibridge.testing import FakeBackend, FakeGuest
from vmibridge.transport import Agent
from vmibridge.transport.agent import traps as module
from vmibridge.transport.wire import (
    Answer,
    Cancel,
    Ended,
    Hello,
    Native,
    Trap,
)
from vmibridge.vm.trap import RegisterWrites

pytestmark = pytest.mark.anyio


class TestAnswers:
    async def test_the_guest_starts_when_the_server_has_said_what_it_wants(self, url):
        wanted = []

        class Vm(FakeGuest):
            async def run(self, traps, sink):
                wanted.append(traps)
                return await super().run(traps, sink)

        async with beside(Vm(guest_of({}), vm="web"), url) as (agent, server):
            hello = await server.greet(welcome(magics=(0x1234, STANDARD_MAGIC)))
            assert isinstance(hello, Hello)
            assert (hello.word, hello.version, hello.vm) == ("vmibridge", 1, "web")
            assert hello.session == agent.session
            first = await server.next()
            assert isinstance(first, Trap)
            assert wanted[0].magics == {0x1234, STANDARD_MAGIC}
            server.post(Native(first.seq))

    async def test_a_trap_gets_the_answer_of_the_server_once(self, url):
        vm = FakeGuest(guest_of({}, {}))
        async with beside(vm, url) as (agent, server):
            await server.greet()
            first = await server.next()
            server.post(Answer(first.seq, 0x1003, 7))
            second = await server.next()
            server.post(Answer(first.seq, 0x1003, 8))
            server.post(Native(second.seq))
            server.post(Native(99))
        assert vm.answers == [RegisterWrites(0x1003, 7), None]
        assert (agent.counts.traps, agent.counts.answered, agent.counts.late) == (2, 2, 2)
        assert agent.end.vcpus[0].reason == "halted"

    async def test_a_vcpu_has_one_trap_in_flight_and_the_others_go_on(self, url):
        events = [trap(1), trap(2), trap(3, vcpu=1), trap(4)]
        vm = FakeBackend(events)
        async with beside(vm, url) as (_, server):
            await server.greet()
            assert [(await server.next()).seq for _ in range(2)] == [1, 3]
            await server.nothing_comes()
            server.post(Native(3))
            server.post(Native(1))
            assert (await server.next()).seq == 2
            server.post(Native(2))
            assert (await server.next()).seq == 4
            server.post(Native(4))
        assert vm.writes == dict.fromkeys((1, 2, 3, 4))

    async def test_an_answer_that_waits_for_the_backend_holds_nobody_else(self, url):
        free = anyio.Event()

        class Vm(FakeGuest):
            async def resume(self, event, writes):
                if event.vcpu == 0:
                    await free.wait()
                await super().resume(event, writes)

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: vm.call(PACKET, vcpu=0))
                await anyio.sleep(0.001)
                await vm.call(PACKET, vcpu=1)
                free.set()

        async with beside(Vm(guest), url) as (_, server):
            await server.greet()
            first, second = await server.next(), await server.next()
            server.post(Native(first.seq))
            server.post(Native(second.seq))

    async def test_a_backend_that_fails_to_write_an_answer_is_logged(self, url, caplog):
        class Vm(FakeGuest):
            async def resume(self, event, writes):
                if event.seq == 1:
                    await anyio.sleep(0.001)
                await super().resume(event, writes)
                raise BackendError("gone")

        async with beside(Vm(guest_of({}, {})), url) as (_, server):
            await server.greet()
            for _ in range(2):
                server.post(Native((await server.next()).seq))
        assert caplog.text.count("was not written") == 2

    async def test_many_traps_wait_behind_one_and_a_full_agent_holds_the_vcpu(
        self, url, monkeypatch
    ):
        monkeypatch.setattr(module, "_QUEUE", 2)
        vm = FakeBackend([trap(n) for n in range(1, 8)])
        async with beside(vm, url) as (_, server):
            await server.greet()
            for seq in range(1, 8):
                assert (await server.next()).seq == seq
                server.post(Native(seq))
        assert len(vm.writes) == 7


class TestDeadlines:
    async def test_the_server_is_told_how_long_the_vcpu_waits(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(welcome(timeout=2000))
            first = await server.next()
            assert first.left == 2250
            server.post(Native(first.seq))

    async def test_a_trap_without_an_answer_gets_the_fallback(self, url):
        vm = FakeGuest(guest_of({}))
        async with beside(vm, url, deadline=0.05) as (agent, server):
            await server.greet()
            first = await server.next()
            assert first.left == 50
            assert await server.next() == Cancel(first.seq)
        assert vm.answers == [RegisterWrites(0x1003, 0xBAD)]
        assert (agent.counts.own, agent.counts.answered) == (1, 0)

    async def test_it_does_so_while_the_server_is_away_too(self, url):
        vm = FakeGuest(guest_of({}, {}))
        async with beside(vm, url, deadline=0.05) as (agent, server):
            await server.greet()
            await server.next()
            server.hang_up()
            with anyio.fail_after(10):
                while agent.counts.own < 2:
                    await anyio.sleep(0.001)
            await server.greet(welcome(INCARNATIONS[1]))
        assert vm.answers == [RegisterWrites(0x1003, 0xBAD)] * 2

    async def test_what_may_be_a_hypercall_of_others_runs_natively(self, url):
        vm = FakeGuest(guest_of({}))
        vm.other_hypercalls = True
        async with beside(vm, url, deadline=0.05) as (_, server):
            assert (await server.greet()).other_hypercalls
        assert vm.answers == [None]

    async def test_a_server_without_a_deadline_does_not_make_it_wait_for_ever(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(welcome(timeout=0xFFFF_FFFF))
            first = await server.next()
            assert first.left == 3_600_000
            server.post(Native(first.seq))

    async def test_a_vcpu_that_is_gone_is_told_to_the_server(self, url):
        class Vm(FakeGuest):
            async def call(self, packet, **options):
                answer = None
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(super().call, packet)
                    await sent.wait()
                    self._sink.abandon(self.events[0])
                return answer

        sent = anyio.Event()
        async with beside(Vm(guest_of({})), url) as (agent, server):
            await server.greet()
            first = await server.next()
            sent.set()
            assert await server.next() == Cancel(first.seq)
        assert agent.counts.own == 1


class TestLimits:
    async def test_more_vcpus_than_the_server_takes_are_answered_here(self, url):
        vm = FakeBackend([trap(n, vcpu=n) for n in range(1, 4)])
        async with beside(vm, url) as (agent, server):
            await server.greet(welcome(vcpus=2))
            frames = [await server.next() for _ in range(3)]
            assert Cancel(3) in frames
            for seq in (1, 2):
                server.post(Native(seq))
        assert vm.writes == {1: None, 2: None, 3: RegisterWrites(0x1003, 0xBAD)}
        assert agent.counts.own == 1

    async def test_registers_that_cannot_be_sent_are_answered_here(self, url):
        vm = FakeBackend([trap(1, value=1 << 70)])
        async with beside(vm, url) as (agent, server):
            await server.greet()
        assert agent.counts.own == 1


class TestUse:
    async def test_it_runs_once(self, url):
        async with beside(FakeGuest(guest_of()), url) as (agent, server):
            await server.greet()
            with pytest.raises(ServerStateError):
                await agent.run()

    async def test_a_vm_that_cannot_be_run_is_an_error(self, url):
        class Vm(FakeBackend):
            async def run(self, traps, sink):
                raise BackendError("no such machine")

        server = FakeServer(url)
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)

            async def play():
                await server.greet()
                end = await server.next()
                assert end.vcpus[0].reason == "lost"
                server.post(Ended())

            tasks.start_soon(play)
            async with Vm() as vm:
                with pytest.raises(BackendError, match="no such machine"):
                    await Agent(vm, url).run()
            tasks.cancel_scope.cancel()

    @pytest.mark.parametrize(
        "options",
        [
            {"deadline": 0}, {"vm": ""}, {"vm": "x" * 65}, {"vm": "a\n"}, {"silence": 0},
            {"grace": -1}, {"longest_pause": 0},
        ],
    )  # fmt: skip
    def test_an_option_that_makes_no_sense_is_a_value_error(self, url, options):
        with pytest.raises(ValueError):
            Agent(FakeBackend(), url, **options)

    def test_a_url_that_is_wrong_is_told(self):
        with pytest.raises(BackendSpecError):
            Agent(FakeBackend(), "unix:")
