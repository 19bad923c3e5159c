"""The agent, against a server that is played: accesses to guest memory."""

import anyio
import pytest
from played_server import INCARNATIONS, beside, guest_of, welcome

from vmibridge import BridgePacket
from vmibridge.bridge.contract import STANDARD_MAGIC, GuestRead
from vmibridge.testing import FakeGuest
from vmibridge.transport.wire import (
    Memory,
    Native,
    Read,
    Trap,
    Write,
    wire_read,
)

pytestmark = pytest.mark.anyio


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
