"""A loop that stood still, as under a handler that blocks, takes that for no silence of a QEMU.

Time is made up (`still_time`): a loop that stands still finds that much of it gone at its next
turn, together with what came meanwhile. Each peer says the rest of what it has to say a few turns
later, as most of what a loop hears goes from one task to another.
"""

import socket
import struct
from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fake_gdbstub import ADD, HALTED, Stage
from still_time import LOOPS, run_still

from vmibridge import Bridge, BridgeServer
from vmibridge.aio import sockets
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb import steps
from vmibridge.backends.qemu.gdb.client import PATIENCE
from vmibridge.backends.qemu.gdb.packets import encode
from vmibridge.backends.qemu.plugin.protocol import REGISTER_NAMES
from vmibridge.backends.qemu.qmp import Qmp

LONG = 30.0
"""Seconds: more than any peer here has."""
GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}}}}\n'
EVENT = b'{"event": "RESUME"}\n'


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.name)
def still(request):
    return request.param


async def stand_still(loop):
    loop.advance(LONG)
    for _ in range(4):
        await checkpoint()


class LateMonitor:
    """The other end of a monitor's connection. The loop stands still while it sends `late_in`."""

    def __init__(self, loop, ends, late_in):
        self._loop, self._end, self._late_in = loop, ends, late_in

    async def say(self, what, line):
        if what == self._late_in:
            # Something to hear by now, and the rest of it later.
            await sockets.send(self._end, EVENT if what != "greeting" else b" ")
            await stand_still(self._loop)
        await sockets.send(self._end, line)

    async def serve(self):
        await self.say("greeting", GREETING)
        await sockets.receive(self._end, 4096)
        await self.say("agreement", b'{"return": {}, "id": 0}\n')
        try:
            await sockets.receive(self._end, 4096)
            await self.say("status", b'{"return": {"status": "running"}, "id": 1}\n')
        except anyio.EndOfStream:
            pass


def made_pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class TestQmp:
    @pytest.mark.parametrize("late_in", ["greeting", "agreement", "status"])
    def test_a_monitor_that_spoke_meanwhile_is_there(self, still, late_in):
        async def ask():
            ours, theirs = made_pair()
            with theirs:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(LateMonitor(still, theirs, late_in).serve)
                    async with Qmp(ours) as qmp:
                        return await qmp.execute("query-status", dict)

        assert run_still(still, ask) == {"status": "running"}


class TestThePlugin:
    def test_one_that_said_hello_meanwhile_is_served(self, still, tmp_path):
        path = tmp_path / "s"
        head = (3, 7, 1, 0, 1, b"x86_64", b"x86", 1)
        body = struct.pack("<IIQII16s12sI", *head) + ",".join(REGISTER_NAMES).encode()
        hello = struct.pack("<II", 1, len(body)) + body

        async def greet():
            with await sockets.connect(socket.AF_UNIX, str(path)) as plugin:
                await sockets.send(plugin, hello[:20])
                # The host has taken the connection, and the first piece.
                await still.quiet()
                await sockets.send(plugin, hello[20:40])
                await stand_still(still)
                await sockets.send(plugin, hello[40:])
                return await sockets.receive(plugin, 4)

        async def main():
            async with open_backend(f"qemu-plugin:unix:{path}") as backend:
                server = BridgeServer(backend, Bridge(), timeout=60)
                async with anyio.create_task_group() as tasks:

                    async def serve():
                        async for _ in server.run():
                            pass

                    tasks.start_soon(serve)
                    await still.quiet()
                    greeting = await greet()
            return greeting

        welcome = 16
        assert run_still(still, main) == welcome.to_bytes(4, "little")


class TestTheGdbStub:
    """`late_in`: the command in which the loop stands still."""

    @pytest.fixture
    def stage(self, tmp_path):
        return Stage(tmp_path / "s")

    def stands_still_in(self, stage, still, late_in):
        async def before_reply(packet):
            if packet.startswith(late_in):
                # Once.
                stage.stub.before_reply = None
                await stand_still(still)

        stage.stub.before_reply = before_reply

    async def runs_on(self, still, stub):
        # Not `runs`, which would wait for good for a stub that was lost: no time goes by here.
        await still.quiet()
        assert stub.running.is_set()

    def test_its_monitor_is_asked_for_who_paused_the_vm(self, still, stage, tmp_path):
        monitor = tmp_path / "monitor"
        stage.options += f"&qmp={monitor}"

        async def play_monitor(end):
            with end:
                await LateMonitor(still, end, "status").serve()

        async def main():
            listener = await sockets.listen_unix(monitor, 0o600)
            async with stage.playing(), anyio.create_task_group() as tasks:
                take = partial(tasks.start_soon, play_monitor)
                tasks.start_soon(sockets.accept, listener.socket, take)
                async with stage.backend():
                    pass
                listener.close()
                tasks.cancel_scope.cancel()

        run_still(still, main)

    def test_one_that_was_not_run_is_left_whole(self, still, stage):
        async def main():
            async with stage.playing() as stub, stage.backend():
                self.stands_still_in(stage, still, b"Hgp0.0")
            return stub.said[-1]

        assert run_still(still, main) == b"D;1"

    def test_one_that_was_stopped_is_left_whole(self, still, stage):
        async def main():
            async with stage.playing() as stub, stage.serving():
                await stub.runs()
                self.stands_still_in(stage, still, b"Hgp0.0")
                stage.server.stop()
            return stub.said[-1]

        assert run_still(still, main) == b"D;1"

    def test_a_step_that_ended_meanwhile_is_not_interrupted(self, still, stage):
        async def main():
            async with stage.run() as stub:
                await stub.runs()
                stepped, ends, interrupts = anyio.Event(), anyio.Event(), []

                async def before_reply(packet):
                    if packet == b"\x03":
                        interrupts.append(packet)
                    if packet.startswith(b"vCont;s"):
                        stepped.set()
                        await ends.wait()

                stub.before_reply = before_reply
                # A trap that is not ours is stepped over.
                await stub.call(ADD, rcx=0)
                await stepped.wait()
                await still.quiet()
                await stand_still(still)
                ends.set()
                await self.runs_on(still, stub)
                assert interrupts == []
                await stub.stop(b"W00")

        run_still(still, main)
        assert stage.ends == HALTED

    def test_a_step_that_was_interrupted_meanwhile_has_stopped(self, still, stage):
        async def main():
            async with stage.run() as stub:
                stub.replies[b"vCont;s"] = []
                await stub.runs()
                stepped, interrupted = anyio.Event(), anyio.Event()

                async def before_reply(packet):
                    if packet.startswith(b"vCont;s"):
                        stepped.set()
                    if packet == b"\x03" and stepped.is_set() and not interrupted.is_set():
                        interrupted.set()
                        await stand_still(still)
                        await stub.stream.send(encode(b"T02thread:p01.01;"))

                stub.before_reply = before_reply
                await stub.call(ADD, rcx=0)
                await stepped.wait()
                while not interrupted.is_set():
                    still.advance(steps._STEP / 4)
                    await still.quiet()
                await self.runs_on(still, stub)
                await stub.stop(b"W00")

        run_still(still, main)
        assert stage.ends == HALTED

    def test_one_that_replied_meanwhile_is_not_lost(self, still, stage):
        async def main():
            async with stage.run() as stub:
                await stub.runs()
                asked, replies = anyio.Event(), anyio.Event()

                async def before_reply(packet):
                    if packet == b"g":
                        stub.before_reply = None
                        asked.set()
                        await replies.wait()
                        await stand_still(still)

                stub.before_reply = before_reply
                await stub.call(ADD, 1)
                await asked.wait()
                # Once more it has looked at what the stub owes.
                for _ in range(4):
                    still.advance(PATIENCE / 4)
                    await still.quiet()
                replies.set()
                await self.runs_on(still, stub)
                await stub.stop(b"W00")

        run_still(still, main)
        assert (stage.ends, stage.outcomes) == (HALTED, ["handled"])
