"""A guest that polls by VMCALL before, between and after its hosts, under TCG."""

import re
import struct
from contextlib import asynccontextmanager

import anyio
import pytest
from gdb_machine import machine_of
from micro_guest import Work
from patience import HUNG

from vmibridge import open_backend
from vmibridge.backends.qemu.gdb.packets import encode
from vmibridge.errors import BackendSpecError

pytestmark = pytest.mark.anyio

VMCALL = [0x0F, 0x01, 0xC1]
SKIPPED = [0x0F, 0x1F, 0xC1]


class Poller:
    """The guest of `guests/poll.asm`."""

    def __init__(self, machine, image):
        self.machine, self.image = machine, image
        (site, *self.counters) = struct.unpack_from("<4I", image.read_bytes(), 32)
        machine.sites = [site]

    @asynccontextmanager
    async def polling(self, *more):
        with anyio.fail_after(HUNG):
            async with self.machine.booted(*more, "-kernel", str(self.image)):
                yield
                assert self.machine.process.returncode is None, "the guest saw something else"
                self.machine.process.kill()

    async def memory(self, address, size):
        """Bytes, by QEMU's monitor, which leaves the VM as it is."""
        text = await self.machine.human(f"xp /{size}xb {address:#x}")
        return [int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})\b", text)]

    async def counts(self):
        """Answered, undefined, skipped."""
        return [
            int.from_bytes(await self.memory(address, 4), "little") for address in self.counters
        ]

    async def goes_on(self, kind):
        """Wait until the guest has made ten calls that end in this way; returns all counts
        before."""
        before = await self.counts()
        while (await self.counts())[kind] < before[kind] + 10:
            await anyio.sleep(0.01)
        return before

    async def serve(self, options=""):
        """A host that answers a hundred calls."""
        work = Work()
        async with self.machine.host(work, options) as server:
            await work.begun.wait()
            server.stop()
        return work

    async def prepare(self, options):
        """A host that is open for a moment, and never runs."""
        async with open_backend(self.machine.spec(options)):
            pass


ANSWERED, UNDEFINED, LEFT_OUT = range(3)


@pytest.fixture(params=["system", "new"])
def guest(request, build_guest, tmp_path):
    return Poller(machine_of(request.param, request, build_guest, tmp_path), build_guest("poll"))


async def test_native_runs_natively_before_between_and_after_hosts(guest):
    async with guest.polling():
        await guest.goes_on(UNDEFINED)
        for _ in range(2):
            await guest.serve("&leave=native")
            await guest.goes_on(UNDEFINED)
            assert await guest.memory(guest.machine.sites[0], 3) == VMCALL
        assert (await guest.counts())[LEFT_OUT] == 0


async def test_skip_goes_on_behind_the_call_between_and_after_hosts(guest):
    async with guest.polling():
        await guest.goes_on(UNDEFINED)
        for _ in range(2):
            await guest.serve("&leave=skip")
            before = await guest.goes_on(LEFT_OUT)
            assert await guest.memory(guest.machine.sites[0], 3) == SKIPPED
            assert (await guest.counts())[UNDEFINED] == before[UNDEFINED]
        # One that leaves it native makes it what it was.
        await guest.serve()
        await guest.goes_on(UNDEFINED)
        assert await guest.memory(guest.machine.sites[0], 3) == VMCALL


async def test_wait_holds_the_guest_between_and_after_hosts_and_no_call_is_lost(guest):
    async with guest.polling():
        await guest.goes_on(UNDEFINED)
        await guest.serve("&leave=wait")
        await guest.machine.has_status("debug")
        before = await guest.counts()
        await guest.serve("&leave=wait")
        await guest.machine.has_status("debug")
        answered, *others = await guest.counts()
        assert others == before[1:]
        assert answered >= before[ANSWERED] + 100
        await guest.serve()
        await guest.goes_on(UNDEFINED)


@pytest.mark.parametrize("leave", ["skip", "wait"])
async def test_a_host_that_only_opens_prepares_a_guest_for_those_to_come(guest, leave):
    async with guest.polling():
        await guest.goes_on(UNDEFINED)
        await guest.prepare(f"&leave={leave}")
        if leave == "skip":
            await guest.goes_on(LEFT_OUT)
        else:
            await guest.machine.has_status("debug")
        before = await guest.counts()
        await guest.serve("&leave=wait")
        assert (await guest.counts())[UNDEFINED] == before[UNDEFINED]


async def test_a_guest_that_has_not_begun_may_be_told_to_wait_for_a_host(guest):
    async with guest.polling("-S"):
        await guest.prepare("&leave=wait")
        await guest.machine.command("cont")
        await guest.machine.has_status("debug")
        await guest.serve("&leave=wait")
        assert (await guest.counts())[1:] == [0, 0]


async def test_a_host_that_was_killed_leaves_a_guest_that_the_next_one_serves(guest, caplog):
    async with guest.polling():
        await guest.goes_on(UNDEFINED)
        before = await guest.counts()
        async with await anyio.connect_unix(guest.machine.stub) as killed:
            point = b"Z0,%x,1" % guest.machine.sites[0]
            await killed.send(b"".join(map(encode, (b"?", point, b"c"))))
            said = b""
            while b"T05" not in said.partition(b"OK")[2]:
                said += await killed.receive()
        await guest.machine.has_status("debug")
        await guest.serve()
        assert "found at a breakpoint (status 'debug')" in caplog.text
        await guest.goes_on(UNDEFINED)
        assert (await guest.counts())[ANSWERED] >= before[ANSWERED] + 100


async def test_skip_needs_sites():
    with pytest.raises(BackendSpecError, match="leave=skip needs sites"):
        open_backend("qemu-gdb:unix:/s?ud-handler=1&leave=skip")
