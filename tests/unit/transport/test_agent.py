"""The agent, against a server that is played here."""

from contextlib import asynccontextmanager

import anyio
import pytest
from remote_parts import trap

from vmibridge import BridgePacket
from vmibridge.bridge.contract import STANDARD_MAGIC, GuestRead
from vmibridge.errors import BackendError, BackendSpecError, ServerStateError
from vmibridge.testing import FakeBackend, FakeGuest
from vmibridge.transport import Agent
from vmibridge.transport.agent import traps as module
from vmibridge.transport.sockets.connection import Connection
from vmibridge.transport.sockets.endpoints import listen
from vmibridge.transport.urls import parse_url
from vmibridge.transport.wire import (
    FRAME_LIMIT,
    FROM_AGENT,
    Answer,
    Cancel,
    End,
    Ended,
    Hello,
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
    wire_read,
)
from vmibridge.vm.trap import RegisterWrites

pytestmark = pytest.mark.anyio
PACKET = BridgePacket(STANDARD_MAGIC, 0x0100, 1, 5)
FALLBACK = (0xBAD, None, None, None)
INCARNATIONS = [bytes([n]) * 16 for n in range(9)]


def welcome(
    incarnation=INCARNATIONS[0],
    timeout=60_000,
    reads=(),
    vcpus=64,
    magics=(STANDARD_MAGIC,),
):
    return Welcome(1, incarnation, 0, magics, False, False, timeout, FALLBACK, vcpus, reads)


class FakeServer:
    """Takes connections one after the other, and says what it is told to."""

    def __init__(self, url):
        self.url = url
        self.accepted = []
        self.came = anyio.Event()
        self.connection = None
        self.frames = []

    async def run(self, *, task_status):
        listening = await listen(parse_url(self.url))
        task_status.started()
        try:
            await listening.accept(self._take)
        finally:
            listening.close()
            for each in (*self.accepted, self.connection):
                if each is not None:
                    each.close()

    def _take(self, accepted):
        self.accepted.append(Connection(accepted, FROM_AGENT))
        self.came.set()

    async def greet(self, answer=None):
        """Take the next connection, hear its HELLO and answer it."""
        with anyio.fail_after(10):
            while not self.accepted:
                self.came = anyio.Event()
                await self.came.wait()
        if self.connection is not None:
            self.connection.close()
        self.connection = self.accepted.pop(0)
        self.connection.reader.limit = FRAME_LIMIT
        self.frames = []
        hello = await self.next()
        self.post(answer or welcome())
        return hello

    def post(self, frame):
        self.connection.post(frame)

    async def next(self):
        """The next frame that is no PING."""
        with anyio.fail_after(10):
            while True:
                while not self.frames:
                    self.frames += await self.connection.receive()
                frame = self.frames.pop(0)
                if not isinstance(frame, Ping):
                    return frame

    async def nothing_comes(self):
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.05):
                self.frames += await self.connection.receive()
                raise AssertionError(self.frames)

    def hang_up(self):
        self.connection.close()


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'agent.sock'}"


@asynccontextmanager
async def beside(backend, url, *, ends=True, **options):
    """An agent that carries `backend`, and a server that is played; `agent.end` at the end."""
    server = FakeServer(url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        async with backend:
            agent = Agent(backend, url, **{"longest_pause": 0.05, **options})

            async def run():
                agent.end = await agent.run()

            agent.ran = anyio.Event()
            tasks.start_soon(run)
            yield agent, server
            if ends:
                while not isinstance(await server.next(), End):
                    pass
                server.post(Ended())
            else:
                agent.stop(now=True)
                tasks.cancel_scope.cancel()
            with anyio.fail_after(10):
                while not hasattr(agent, "end") and ends:
                    await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()


def guest_of(*calls):
    """A guest that calls once for each, and keeps what came back in `vm.answers`."""

    async def guest(vm):
        vm.answers = []
        for options in calls:
            vm.answers.append(await vm.call(PACKET, **options))

    return guest


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


class TestReconnection:
    async def test_a_trap_in_flight_is_sent_again_with_its_number(self, url):
        vm = FakeGuest(guest_of({}))
        async with beside(vm, url) as (agent, server):
            hello = await server.greet()
            first = await server.next()
            server.hang_up()
            again = await server.greet()
            assert again.session == hello.session
            second = await server.next()
            assert (second.seq, second.registers) == (first.seq, first.registers)
            assert not second.elsewhere
            assert second.left <= first.left
            server.post(Native(first.seq))
        assert (agent.counts.connections, agent.counts.sent_again) == (2, 1)

    async def test_one_that_another_incarnation_may_have_run_is_marked(self, url):
        async with beside(FakeGuest(guest_of({}, {})), url) as (_, server):
            await server.greet(welcome(INCARNATIONS[0]))
            first = await server.next()
            server.hang_up()
            for incarnation in INCARNATIONS[1:3]:
                await server.greet(welcome(incarnation))
                assert (await server.next()).elsewhere
                server.hang_up()
            await server.greet(welcome(INCARNATIONS[0]))
            assert not (await server.next()).elsewhere
            server.post(Native(first.seq))
            second = await server.next()
            assert not second.elsewhere
            server.post(Native(second.seq))

    async def test_one_that_was_given_back_is_not(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(welcome(INCARNATIONS[0]))
            first = await server.next()
            server.post(Returned(first.seq))
            server.post(Returned(99))
            server.hang_up()
            await server.greet(welcome(INCARNATIONS[1]))
            assert not (await server.next()).elsewhere
            server.post(Native(first.seq))

    async def test_a_trap_that_comes_in_between_is_sent_when_there_is_a_server(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()
            await vm.call(PACKET)

        async with beside(FakeGuest(guest), url) as (agent, server):
            await server.greet()
            while agent._in_flight.link is None:
                await anyio.sleep(0.001)
            server.hang_up()
            while agent._in_flight.link is not None:
                await anyio.sleep(0.001)
            start.set()
            await server.greet(welcome(INCARNATIONS[1]))
            first = await server.next()
            assert not first.elsewhere
            server.post(Native(first.seq))

    @pytest.mark.parametrize("frame", [welcome(), "garbage"], ids=["welcome", "garbage"])
    async def test_a_server_that_sends_what_it_must_not_is_left(self, url, frame):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet()
            first = await server.next()
            if frame == "garbage":
                server.connection._socket.send(b"\xff" * 100)
            else:
                server.post(frame)
            await server.greet()
            assert (await server.next()).seq == first.seq
            server.post(Native(first.seq))

    async def test_one_that_says_nothing_for_long_is_left(self, url):
        async with beside(FakeGuest(guest_of({})), url, silence=0.5) as (_, server):
            await server.greet()
            first = await server.next()
            await server.greet()
            assert (await server.next()).seq == first.seq
            server.post(Native(first.seq))

    async def test_one_that_answers_pings_is_not(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()
            await vm.call(PACKET)

        async with beside(FakeGuest(guest), url, silence=1) as (agent, server):
            await server.greet()
            for _ in range(4):
                while not server.frames:
                    server.frames += await server.connection.receive()
                assert server.frames == [Ping()]
                server.frames.clear()
                server.post(Pong())
            start.set()
            server.post(Native((await server.next()).seq))
        assert agent.counts.connections == 1

    async def test_other_traps_that_a_server_wants_later_are_logged(self, url, caplog):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet()
            first = await server.next()
            server.hang_up()
            await server.greet(welcome(magics=(1, 2)))
            server.post(Native(first.seq))
        assert "wants other traps now" in caplog.text


class TestRefusal:
    async def test_a_final_one_ends_the_run(self, url):
        server = FakeServer(url)
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            tasks.start_soon(server.greet, Refused("not today"))
            async with FakeGuest(guest_of({})) as vm:
                with pytest.raises(BackendError, match="not today"):
                    await Agent(vm, url).run()
            tasks.cancel_scope.cancel()

    async def test_another_one_is_tried_again(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(Refused("in use", final=False))
            await server.greet()
            first = await server.next()
            # With a guest that runs, none is final.
            server.hang_up()
            await server.greet(Refused("not today"))
            await server.greet()
            server.post(Native(first.seq))


class TestMemory:
    AT = 0x5000

    async def test_it_is_accessed_for_a_trap_that_waits(self, url):
        vm = FakeGuest(guest_of({}), memory={self.AT: b"0123456789"})
        async with beside(vm, url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            server.post(Read(1, seq, self.AT + 2, 3))
            assert await server.next() == Memory(1, b"234")
            server.post(Write(2, seq, self.AT, b"abc"))
            assert await server.next() == Memory(2)
            server.post(Read(3, seq, 0x9000_0000, 3))
            assert (await server.next()).error == "not mapped"
            server.post(Native(seq))
        assert vm.memory[self.AT] == b"abc3456789"

    async def test_it_is_not_for_one_that_does_not(self, url):
        vm = FakeGuest(guest_of({}, {}), memory={self.AT: b"0123456789"})
        async with beside(vm, url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            server.post(Native(seq))
            server.post(Write(1, seq, self.AT, b"abc"))
            came = {type(frame): frame for frame in [await server.next(), await server.next()]}
            assert "runs again" in came[Memory].error
            server.post(Native(came[Trap].seq))
        assert vm.memory[self.AT] == b"0123456789"

    async def test_a_write_that_is_asked_for_again_is_done_once(self, url):
        written = []

        class Vm(FakeGuest):
            async def write_physical(self, event, address, data):
                await anyio.sleep(0.001)
                written.append(data)

        async with beside(Vm(guest_of({})), url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            for _ in range(2):
                server.post(Write(1, seq, self.AT, b"abc"))
            assert await server.next() == Memory(1)
            server.post(Write(1, seq, self.AT, b"abc"))
            assert await server.next() == Memory(1)
            assert written == [b"abc"]
            server.hang_up()
            # Another incarnation counts from the start: this is another write.
            await server.greet(welcome(INCARNATIONS[1]))
            await server.next()
            server.post(Write(1, seq, self.AT, b"def"))
            assert await server.next() == Memory(1)
            server.post(Native(seq))
        assert written == [b"abc", b"def"]

    @pytest.mark.parametrize(
        "asked", [Read(1, 1, AT, 4), Write(1, 1, AT, b"old")], ids=["read", "write"]
    )
    async def test_the_reply_to_a_memory_that_is_gone_is_not_for_the_next(self, url, asked):
        """Each counts its accesses from 1."""
        began = anyio.Event()
        go_on = {"old": anyio.Event(), "new": anyio.Event()}
        done = []

        class Vm(FakeGuest):
            async def read_physical(self, event, address, size):
                if size == 4:
                    began.set()
                    await go_on["old"].wait()
                    done.append("old")
                return await super().read_physical(event, address, size)

            async def write_physical(self, event, address, data):
                began.set()
                await go_on[data.decode()].wait()
                done.append(data.decode())

        vm = Vm(guest_of({}), memory={self.AT: b"0123456789"})
        async with beside(vm, url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            server.post(asked)
            await began.wait()
            server.hang_up()
            await server.greet(welcome(INCARNATIONS[1]))
            await server.next()
            server.post(Write(1, seq, self.AT, b"new"))
            server.post(Read(2, seq, self.AT, 2))
            assert await server.next() == Memory(2, b"01")
            go_on["old"].set()
            while not done:
                await anyio.sleep(0)
            # Asked for again, it is under way all the same.
            server.post(Write(1, seq, self.AT, b"new"))
            server.post(Read(3, seq, self.AT, 2))
            assert await server.next() == Memory(3, b"01")
            go_on["new"].set()
            assert await server.next() == Memory(1)
            server.post(Native(seq))
        assert done == ["old", "new"]

    async def test_a_backend_that_raises_is_an_error_of_that_access(self, url):
        class Vm(FakeGuest):
            async def read_physical(self, event, address, size):
                raise OSError("broken")

        async with beside(Vm(guest_of({})), url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            server.post(Read(1, seq, self.AT, 3))
            assert (await server.next()).error == "OSError: broken"
            server.post(Native(seq))

    async def test_a_server_that_asks_for_too_much_at_a_time_is_left(self, url):
        class Vm(FakeGuest):
            async def read_physical(self, event, address, size):
                await anyio.sleep_forever()

        async with beside(Vm(guest_of({})), url) as (_, server):
            await server.greet()
            seq = (await server.next()).seq
            server.connection.cork()
            for number in range(600):
                server.post(Read(number, seq, self.AT, 3))
            server.connection.uncork()
            await server.greet()
            assert (await server.next()).seq == seq
            server.post(Native(seq))

    async def test_what_a_handler_is_known_to_read_travels_with_the_trap(self, url):
        reads = (
            wire_read(STANDARD_MAGIC, 0x0100, GuestRead(1, 4)),
            wire_read(STANDARD_MAGIC, 0x0100, GuestRead(2, 64, size_in=3, method=1)),
            wire_read(STANDARD_MAGIC, 0x0100, GuestRead(2, 64, method=2)),
            wire_read(None, 0x0200, GuestRead(1, 4)),
        )
        packet = BridgePacket(STANDARD_MAGIC, 0x0100, 1, self.AT, 0x6000, 2)

        async def guest(vm):
            await vm.call(packet)
            await vm.call(BridgePacket(STANDARD_MAGIC, 0x0100, 1, 0x7777_0000, 0x6000, 2))
            await vm.call(BridgePacket(STANDARD_MAGIC, 0x0300, 1))

        vm = FakeGuest(guest, memory={self.AT: b"0123456789", 0x6000: b"abc"})
        async with beside(vm, url) as (_, server):
            await server.greet(welcome(reads=reads))
            for expected in (((self.AT, b"0123"), (0x6000, b"ab")), ((0x6000, b"ab"),), ()):
                frame = await server.next()
                assert frame.memory == expected
                server.post(Native(frame.seq))


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


class TestStop:
    async def test_traps_in_flight_have_the_grace_period(self, url):
        async with beside(FakeGuest(guest_of({}, {})), url, grace=60) as (agent, server):
            await server.greet()
            first = await server.next()
            agent.stop()
            server.post(Answer(first.seq, 0x1003, 7))
        assert agent.counts.answered == 1
        assert agent.end.vcpus[0].reason == "stopped"

    async def test_without_it_they_get_the_fallback(self, url):
        vm = FakeGuest(guest_of({}, {}))
        async with beside(vm, url) as (agent, server):
            await server.greet()
            await server.next()
            agent.stop(now=True)
        assert vm.writes == {1: RegisterWrites(0x1003, 0xBAD)}

    async def test_before_there_is_a_server_the_guest_does_not_run(self, url):
        async with FakeGuest(guest_of({})) as vm:
            agent = Agent(vm, url)
            agent.stop()
            with anyio.fail_after(10):
                assert (await agent.run()).vcpus == ()

    async def test_without_a_server_nobody_is_told(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()

        async with beside(FakeGuest(guest), url, ends=False) as (agent, server):
            await server.greet()
            server.hang_up()
            agent.stop(now=True)
            with anyio.fail_after(10):
                while not hasattr(agent, "end"):
                    await anyio.sleep(0.001)

    async def test_an_end_that_was_not_heard_is_told_again(self, url):
        async with beside(FakeGuest(guest_of()), url) as (_, server):
            await server.greet()
            assert isinstance(await server.next(), End)
            server.hang_up()
            await server.greet()

    async def test_a_server_that_has_forgotten_the_vm_by_then_has_heard_it(self, url):
        async with beside(FakeGuest(guest_of()), url, ends=False) as (agent, server):
            await server.greet()
            assert isinstance(await server.next(), End)
            server.hang_up()
            await server.greet(Refused("this VM has ended"))
            with anyio.fail_after(4):
                while not hasattr(agent, "end"):
                    await anyio.sleep(0.001)


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
