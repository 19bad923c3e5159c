"""Servers, agents and NATS that stop, are killed, or say nothing: no trap is lost."""

import signal
import time

import anyio
import pytest
from nats_parts import (
    ON_ASYNCIO,
    Guest,
    Work,
    serve_processes,
)
from patience import HUNG
from remote_parts import AT, carry, served
from waiting import until

from vmibridge import BridgeResponse, method
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentServer

LONG = ServerSettings(timeout=3600)


pytestmark = ON_ASYNCIO


class Blocks(Work):
    """Holds up the loop, which is the agent's, too."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    @method(6)
    async def block(self, vmi, packet):
        self.asked.append(vmi.event.seq)
        # Behind this the agent knows who has the trap.
        await vmi.memory.read_physical(AT, 1)
        time.sleep(self._seconds)
        return BridgeResponse(value1=packet.value1 + 1)


class TestFailures:
    async def test_a_server_that_is_killed_loses_no_trap_and_no_handler_runs_twice_elsewhere(
        self, nats, tmp_path
    ):
        # So long that only the one that is killed counts as gone, however slow the others are.
        url = f"{nats.url}?silence=6"
        vm = Guest(8, 250, codes=(1, 2))
        with serve_processes(
            tmp_path, url, 3, "--repeated", "run", "--timeout", "3600"
        ) as processes:
            killed = processes[0]
            async with anyio.create_task_group() as tasks:

                async def kill():
                    await until(lambda: len(killed.ran()) > 100)
                    killed.process.kill()

                tasks.start_soon(kill)
                with anyio.fail_after(HUNG):
                    agent, end = await carry(vm, url)
            assert killed.process.wait() == -signal.SIGKILL
            ran = [each.ran() for each in processes]
        assert not end.failed
        assert not vm.wrong
        assert sorted(vm.resumed) == list(range(1, 2001))
        assert agent.counts.own == 0
        lived = ran[1] + ran[2]
        assert len(lived) == len(set(lived))
        assert set(lived) | set(ran[0]) == set(range(1, 2001))
        # Those in flight at the one that was killed, and no others.
        assert len(set(lived) & set(ran[0])) <= 8
        assert min(len(each) for each in ran) > 100
        assert sum(agent.shares.values()) == 2000

    async def test_a_server_that_is_silent_is_given_up_and_the_guest_gets_the_fallback(
        self, nats, tmp_path
    ):
        # So long that no server counts as gone that is slow.
        url = f"{nats.url}?silence=5"
        vm = Guest(4, 50, codes=(2,))
        with serve_processes(tmp_path, url, 1, "--timeout", "3600") as (stopped,):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(carry, vm, url)
                await until(lambda: len(stopped.ran()) > 20)
                stopped.process.send_signal(signal.SIGSTOP)
                handler = Work()
                async with served(url, handler, settings=LONG) as server:
                    await until(lambda: len(vm.resumed) == 200)
                    counts = server._vms and next(iter(server._vms.values())).session.counts
            stopped.process.send_signal(signal.SIGCONT)
            ran = stopped.ran()
        assert not set(ran) & set(handler.asked)
        assert len(vm.wrong) == (counts.refused if counts else len(vm.wrong)) <= 4
        assert all(answer.rax is None for _, _, answer in vm.wrong)

    @pytest.mark.no_cover
    async def test_nats_that_is_restarted_loses_no_trap_and_no_handler_runs_twice(self, nats):
        # So long that neither server counts as gone because NATS starts slowly.
        url = f"{nats.url}?silence=6"
        handlers = [Work(), Work()]
        vm = Guest(8, 400)
        async with (
            served(url, handlers[0], settings=LONG, repeated="run"),
            served(url, handlers[1], settings=LONG, repeated="run"),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(carry, vm, url)
            for count in (500, 1500):
                await until(lambda count=count: len(vm.resumed) > count)
                nats.stop()
                await anyio.sleep(0.1)
                nats.start()
        assert not vm.wrong
        assert sorted(vm.resumed) == list(range(1, 3201))
        asked = handlers[0].asked + handlers[1].asked
        assert len(asked) == len(set(asked)) == 3200
        assert all(done == asked for done, asked in map(vm.counted, range(8)))

    async def test_the_agent_waits_for_a_server_and_the_guest_goes_on_when_one_comes(self, nats):
        vm = Guest(2, 40)
        handlers = [Work(), Work()]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry(vm, nats.url, longest_pause=0.05))
            await anyio.sleep(0.2)
            assert not vm.resumed
            async with served(nats.url, handlers[0], settings=LONG) as server:
                await until(lambda: len(vm.resumed) > 20)
                server.stop()
                await until(lambda: not server.vms)
            done = len(vm.resumed)
            assert done < 80
            async with served(nats.url, handlers[1], settings=LONG):
                await until(lambda: len(vm.resumed) == 80)
        assert not vm.wrong
        assert sorted(handlers[0].asked + handlers[1].asked) == list(range(1, 81))

    async def test_at_its_deadline_a_trap_is_answered_by_the_agent_and_the_handler_cancelled(
        self, nats
    ):
        handler = Work()
        vm = Guest(1, 1, codes=(5,))
        async with served(nats.url, handler, settings=LONG):
            agent, _ = await carry(vm, nats.url, deadline=0.2)
            await until(lambda: handler.cancelled)
        assert agent.counts.own == 1
        assert vm.wrong

    async def test_a_loop_that_stood_still_is_no_silence_of_a_server(self, nats, caplog):
        silence = 0.5
        handler = Blocks(1.5 * silence)
        vm = Guest(1, 1, codes=(6,))
        async with served(nats.url, handler, settings=LONG):
            agent, _ = await carry(vm, f"{nats.url}?silence={silence}")
        assert not vm.wrong
        assert handler.asked == [1]
        assert agent.counts.answered == 1
        assert "is gone" not in caplog.text

    async def test_a_guest_goes_on_at_its_deadline_while_nats_is_gone(self, nats):
        handler = Work()
        vm = Guest(2, 30, codes=(1, 2))
        async with served(nats.url, handler), anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry(vm, f"{nats.url}?silence=0.2", deadline=0.1))
            await until(lambda: len(vm.resumed) > 10)
            nats.stop()
            with anyio.fail_after(HUNG):
                await until(lambda: len(vm.resumed) == 60)
        assert vm.wrong

    async def test_a_vm_that_begins_anew_is_served_at_once_when_its_agent_was_killed(self, nats):
        first = Guest(1, 1, codes=(5,))
        handlers = []

        def make(vm):
            handlers.append(Work())
            return handlers[-1]

        server = AgentServer([nats.url], make, settings=LONG)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await server.listening.wait()
            async with anyio.create_task_group() as agents:
                agents.start_soon(carry, first, nats.url)
                await until(lambda: handlers and handlers[0].asked)
                agents.cancel_scope.cancel()
            second = Guest(1, 5)
            with anyio.fail_after(5):
                await carry(second, nats.url)
            assert not second.wrong
            server.stop(now=True)

    async def test_two_agents_cannot_be_one_vm(self, nats):
        handler = Work()
        vm = Guest(1, 1, codes=(5,))
        async with served(nats.url, handler, settings=LONG), anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            await until(lambda: handler.asked)
            with anyio.move_on_after(0.5) as waited:
                await carry(Guest(1, 1), nats.url)
            assert waited.cancelled_caught
            handler.go_on.set()
        assert not vm.wrong
