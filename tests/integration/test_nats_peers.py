"""An agent whose servers say what a test tells them, and a server whose agents do."""

from functools import partial

import anyio
import pytest
from msgspec.structs import replace
from nats_fakes import FakeAgent, FakeServer, answer
from nats_parts import AT, ON_ASYNCIO, Work, ask, nats_server
from remote_parts import carry, frame_of, served, trap
from waiting import until

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC, GuestRead
from vmibridge.bridge.status import Gate
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.nats.message import Ask, Taken
from vmibridge.transport.wire import (
    Answer,
    Cancel,
    End,
    Ended,
    Memory,
    Native,
    Ping,
    Pong,
    Read,
    Refused,
    Returned,
    Trap,
    Welcome,
    Write,
)
from vmibridge.vm.trap import TrapReason

pytestmark = ON_ASYNCIO

LONG = ServerSettings(timeout=3600)


class Calls(FakeGuest):
    """Asks so often, and keeps what it is answered."""

    def __init__(self, count=1, **options):
        super().__init__(self._run, memory={AT: bytes(range(64))}, vm="web", **options)
        self._count = count
        self.answers = []

    async def _run(self, _):
        for value in range(self._count):
            self.answers.append(await self.call(ask(1, value)))

    @property
    def values(self):
        return [None if each is None else each.rax for each in self.answers]


class TestAnAgent:
    async def test_takes_no_answer_of_an_attempt_that_it_has_given_up(self, nats):
        vm = Calls()
        # So long that the second attempt is not given up, too, before it is answered.
        url = f"{nats.url}?silence=3"
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, url)
            first, _, late = await server.next(Trap)
            await server.say(late, Taken(1))
            second, _, reply = await server.next(Trap, 2)
            assert (first.elsewhere, second.elsewhere) == (False, True)
            await server.say(late, answer(1, 0xBAD))
            await server.say(late, Read(1, 1, AT, 8))
            await server.say(late, Taken(1))
            memory, *_ = await server.next(Memory)
            assert "not yours any more" in memory.error
            cancels = [reply for frame, _, reply in server.got if isinstance(frame, Cancel)]
            assert cancels.count(late) >= 1
            await server.say(reply, answer(1, 0x600D))
        assert vm.values == [0x600D]

    async def test_asks_who_has_a_trap_and_each_time_that_is_said_it_waits_on(self, nats):
        vm = Calls()
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            # The server's own deadline, 5 s, is not what is tested here.
            agent = partial(carry, vm, f"{nats.url}?silence=3", deadline=60)
            tasks.start_soon(agent)
            _, _, reply = await server.next(Trap)
            # Nobody has said that it has it: all are asked. Then the one that has.
            _, place, _ = await server.next(Ask)
            assert place == "all"
            # One each half second, and so for longer than the silence.
            for number in range(2, 10):
                await server.say(reply, Taken(1))
                _, place, _ = await server.next(Ask, number)
            assert place != "all"
            await server.say(reply, answer(1, 5))
        assert vm.values == [5]
        assert len(server.frames(Trap)) == 1

    @pytest.mark.parametrize("what", [Returned(1), Refused("too many", final=False)])
    async def test_sends_a_trap_again_that_was_given_back_and_does_not_mark_it(self, nats, what):
        vm = Calls()
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            _, _, reply = await server.next(Trap)
            await server.say(reply, what)
            frame, _, reply = await server.next(Trap, 2)
            assert not frame.elsewhere
            await server.say(reply, answer(1, 5))
        assert vm.values == [5]

    async def test_drops_what_is_garbage_from_nobody_or_about_another_trap(self, nats, caplog):
        caplog.set_level("DEBUG", "vmibridge.transport.nats.agent_link")
        vm = Calls()
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            _, _, reply = await server.next(Trap)
            inbox = reply.removesuffix(".1.1")
            await server.say(reply, answer(2, 0xBAD))
            await server.say(reply, answer(1, 0xBAD), reply="")
            await server.client.publish(reply, b"\7\0\0\0", reply="else")
            for place in ("x", "1", "1.x", "to", "to.x", "to.77", "hello", "probe.x"):
                await server.say(f"{inbox}.{place}", Pong())
                await server.client.publish(
                    f"{inbox}.{place}", b"", headers={"Status": "503"}, reply="else"
                )
            await server.say(reply, answer(1, 5))
        assert vm.values == [5]
        assert caplog.text.count("malformed message") >= 8

    async def test_lets_an_instruction_run_that_the_server_says_is_not_ours(self, nats):
        vm = Calls(2)
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            for number in (1, 2):
                frame, _, reply = await server.next(Trap, number)
                await server.say(reply, Native(frame.seq))
        assert vm.answers == [None, None]

    async def test_publishes_what_is_no_request_where_a_server_of_everything_listens(self, nats):
        class Odd(Calls):
            other_hypercalls = True

            async def _run(self, _):
                await self._sink.put(replace(trap(1), reason=TrapReason.PORT_IO))
                await anyio.sleep_forever()

            async def resume(self, event, writes):
                self.answers.append(writes)
                self._running.cancel()

        vm = Odd()
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            _, place, reply = await server.next(Trap)
            assert place == "vmibridge.web.00000000.0000"
            await server.say(reply, Native(1))
        assert vm.answers == [None]

    async def test_does_no_more_accesses_at_a_time_than_were_agreed_and_all_in_the_end(self, nats):
        vm = Calls()
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            _, _, reply = await server.next(Trap)
            await server.say(reply, *[Read(number, 1, AT, 8) for number in range(1, 401)])
            await server.next(Memory, 400)
            # More than twice as many is no server of ours: it gets none of those beyond.
            await server.say(reply, *[Read(number, 1, AT, 8) for number in range(1001, 1601)])
            await server.next(Memory, 400 + 516)
            await server.say(reply, answer(1, 5))
        assert vm.values == [5]
        replies = server.frames(Memory)
        assert {frame.data for frame in replies} == {bytes(range(8))}
        assert len({frame.access for frame in replies}) == len(replies) == 916

    async def test_takes_no_welcome_of_another_version(self, nats, caplog):
        other = FakeServer.welcome
        other = Welcome(9, *[getattr(other, name) for name in other.__struct_fields__[1:]])
        async with FakeServer.running(nats.url, welcome=other), anyio.create_task_group() as tasks:
            tasks.start_soon(carry, Calls(), nats.url)
            await until(lambda: "no WELCOME; trying again" in caplog.text)
            tasks.cancel_scope.cancel()

    async def test_is_refused_in_one_line(self, nats, caplog):
        why = Refused("not \x1b[31m you", final=False)
        async with FakeServer.running(nats.url, welcome=why), anyio.create_task_group() as tasks:
            tasks.start_soon(carry, Calls(), nats.url)
            await until(lambda: r"refused: not \x1b[31m you; trying again" in caplog.text)
            tasks.cancel_scope.cancel()

    async def test_asks_again_elsewhere_when_the_server_that_said_wait_is_gone(self, nats):
        go_on, told = anyio.Event(), []

        async def guest(vm):
            told.append((await vm.call(ask(1))).rax)
            await go_on.wait()
            assert (await vm.call(ask(1))).rax == 5

        vm = FakeGuest(guest, vm="web")
        async with FakeServer.running(nats.url) as second, anyio.create_task_group() as tasks:
            async with FakeServer.running(nats.url) as first:
                await second.leave_group()
                tasks.start_soon(carry, vm, nats.url)
                _, _, reply = await first.next(Trap)
                await first.say(reply, answer(1, Gate.WAIT))
                await until(lambda: told)
            await second.listen()
            go_on.set()
            _, place, reply = await second.next(Trap)
            assert place.startswith("vmibridge.web")
            assert told == [Gate.WAIT]
            await second.say(reply, answer(2, 5))

    async def test_tells_its_servers_that_it_is_there_until_they_are_not(self, nats):
        vm = Calls()
        url = f"{nats.url}?silence=60"
        async with FakeServer.running(nats.url) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry(vm, url, silence=0.3, deadline=3600))
            _, _, reply = await server.next(Trap)
            await server.say(reply, Taken(1))
            async with FakeServer.running(nats.url) as other:
                # Of a trap that it does not have: so it is known, and has nothing.
                await other.say(reply, Taken(1))
                await other.next(Ping, 3)
            pings = len(server.frames(Ping))
            await server.next(Ping, pings + 6)
            await server.say(reply, answer(1, 5))
        assert vm.values == [5]

    async def test_tells_its_end_again_when_nats_is_there_again(self, nats):
        vm = Calls()
        async with served(nats.url, Work(), settings=LONG) as server:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(carry, vm, nats.url)
                await until(lambda: vm.answers or server.vms)
                nats.stop()
                await anyio.sleep(0.1)
                nats.start()
            await until(lambda: not server.vms)

    async def test_leaves_memory_behind_that_does_not_go_into_a_message(self, tmp_path):
        class Reads(BridgeHandler[None]):
            MAGIC = STANDARD_MAGIC
            REQUEST = 0x0100
            reads = (GuestRead(address=1, size=65536),)

            @method(1)
            async def total(self, vmi, packet):
                data = await vmi.memory.read_physical(AT, 65536)
                return BridgeResponse(value1=sum(data))

        async def guest(vm):
            assert (await vm.call(ask(1, AT))).rax == 65536

        with nats_server(tmp_path, "max_payload: 32768") as nats:
            async with served(nats.url, Reads()):
                agent, _ = await carry(FakeGuest(guest, memory={AT: b"\1" * 65536}), nats.url)
        assert agent.counts.answered == 1


class TestAServer:
    async def test_says_that_it_took_a_trap_whenever_it_is_asked_and_its_answer_again(self, nats):
        work = Work()
        async with served(nats.url, work, settings=LONG), FakeAgent.running(nats.url) as agent:
            _, home = await agent.shake_hands()
            await agent.send(frame_of(trap(1, value=7, code=5)))
            for number in (1, 2):
                _, place, reply = await agent.next(Taken, number)
                assert (place, reply) == ("1.1", home)
                await agent.say(home, Ask(1, 0))
            work.go_on.set()
            for number in (1, 2):
                frame, *_ = await agent.next(Answer, number)
                assert frame.rax == 8
                await agent.say(home, Ask(1, 0))
            # Of another trap it knows nothing.
            await agent.say(home, Ask(9, 0))
            await agent.say(home, Ping(), reply=f"{agent.inbox}.to.1")
            await agent.next(Pong)
        assert {frame.seq for frame in agent.frames(Answer)} == {1}
        assert work.asked == [1]

    async def test_asks_for_memory_again_when_its_reply_may_be_lost(self, nats):
        async with served(nats.url, Work(), settings=LONG), FakeAgent.running(nats.url) as agent:
            _, home = await agent.shake_hands()
            await agent.send(frame_of(trap(1, value=7, code=3)))
            await agent.next(Read)
            for _ in range(2):
                await agent.say(home, Ask(1, 0))
            read, *_ = await agent.next(Read, 2)
            # Once more, in two messages: the second one finds nothing that waits.
            for _ in range(2):
                await agent.say(home, Memory(read.access, bytes(8)))
            write, *_ = await agent.next(Write)
            await agent.say(home, Memory(77), Memory(write.access))
            frame, *_ = await agent.next(Answer)
        assert frame.rax == 8

    async def test_goes_on_with_a_trap_that_comes_again_and_answers_the_last_attempt(self, nats):
        work = Work()
        async with served(nats.url, work, settings=LONG), FakeAgent.running(nats.url) as agent:
            await agent.shake_hands()
            for attempt in (1, 2):
                await agent.send(frame_of(trap(5, value=7, code=5)), attempt)
                _, place, home = await agent.next(Taken, attempt)
                assert place == f"5.{attempt}"
            # One that is over, and a cancel of an attempt that is.
            await agent.send(frame_of(trap(4, value=7, code=5)))
            await agent.say(home, Cancel(5), reply=f"{agent.inbox}.5.1")
            work.go_on.set()
            _, place, _ = await agent.next(Answer)
        assert place == "5.2"
        assert (work.asked, work.cancelled) == ([5], 0)

    async def test_abandons_a_handler_when_the_vcpu_went_on(self, nats):
        work = Work()
        async with served(nats.url, work, settings=LONG), FakeAgent.running(nats.url) as agent:
            await agent.shake_hands()
            await agent.send(frame_of(trap(1, code=5)))
            await until(lambda: work.asked)
            await agent.send(frame_of(trap(2, value=7)))
            frame, *_ = await agent.next(Answer)
            await until(lambda: work.cancelled)
        assert (frame.seq, frame.rax) == (2, 8)

    async def test_refuses_a_trap_of_a_vcpu_too_many_and_serves_the_others(self, nats):
        limits = AgentLimits(vcpus=1)
        async with (
            served(nats.url, Work(), limits=limits),
            FakeAgent.running(nats.url) as agent,
        ):
            await agent.shake_hands()
            await agent.send(frame_of(trap(1, value=7)))
            await agent.next(Answer)
            await agent.send(frame_of(trap(2, vcpu=1, value=7)))
            frame, place, _ = await agent.next(Refused)
            assert (frame.why, place) == ("more than 1 vCPUs", "2.1")
            await agent.send(frame_of(trap(3, value=7)))
            frame, *_ = await agent.next(Answer, 2)
        assert frame.seq == 3

    async def test_drops_what_is_garbage_at_its_inbox_and_at_that_of_all(self, nats, caplog):
        async with (
            served(nats.url, Work()),
            FakeAgent.running(nats.url) as agent,
            FakeAgent.running(nats.url, vm="db", session=b"t" * 16) as other,
        ):
            _, home = await agent.shake_hands()
            await other.shake_hands()
            everybody = f"vmibridge.web.agent.all.{(b's' * 16).hex()}"
            for place in (home, everybody, home.rpartition(".")[0] + ".00"):
                await agent.client.publish(place, b"\7\0\0\0rest")
            await agent.say(everybody.replace("web", "db"), Ask(1, 0))
            await agent.say(everybody, agent.hello, reply="")
            # The subject of another VM, with a HELLO that is known.
            await other.say("vmibridge.web.42494d56.0100", other.hello, Ping(), reply="fake.x")
            await other.say("vmibridge.hello.db", Ping(), reply="fake.x")
            await agent.send(frame_of(trap(1, value=7)))
            frame, *_ = await agent.next(Answer)
        assert frame.rax == 8
        assert caplog.text.count("vm web: malformed message: a frame without its end") == 2
        assert not other.got

    async def test_takes_an_agent_for_away_that_says_nothing_and_back_when_it_does(
        self, nats, caplog
    ):
        caplog.set_level("INFO")
        limits = AgentLimits(silence=0.2)
        async with (
            served(nats.url, Work(), limits=limits) as server,
            FakeAgent.running(nats.url) as agent,
        ):
            _, home = await agent.shake_hands()
            await until(lambda: "vm web: nothing came from its agent for" in caplog.text)
            await agent.say(home, Ping(), reply=f"{agent.inbox}.to.1")
            await agent.next(Pong)
            await agent.send(frame_of(trap(1, value=7)))
            await agent.next(Answer)
            assert server.vms == ["web"]

    async def test_forgets_a_vm_that_has_ended(self, nats):
        limits = AgentLimits(silence=0.2, handshake=0.1)
        async with (
            served(nats.url, Work(), limits=limits) as server,
            FakeAgent.running(nats.url) as agent,
        ):
            _, home = await agent.shake_hands()
            await agent.say(home, End(()), reply=f"{agent.inbox}.to.1")
            await agent.next(Ended)
            await until(lambda: not server.vms)
            listening = server._listener._nats[0]
            await until(lambda: not listening._by_hello)
            # Whoever says its memory now finds none.
            await agent.say(home, Ping(), reply=f"{agent.inbox}.to.1")
        assert not agent.frames(Pong)

    async def test_waits_for_an_agent_that_does_not_say_whether_it_is_there(
        self, nats, monkeypatch
    ):
        monkeypatch.setattr("vmibridge.transport.nats.listener._PROBE", 0.2)
        async with (
            served(nats.url, Work()) as server,
            FakeAgent.running(nats.url) as before,
            FakeAgent.running(nats.url, session=b"t" * 16) as after,
        ):
            await before.shake_hands()
            refused, _ = await after.shake_hands()
            assert isinstance(refused, Refused)
            assert not refused.final
            assert server.vms == ["web"]
