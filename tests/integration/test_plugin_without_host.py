"""A guest that polls before there is a host, with one, between two and after.

It is `guests/polling.asm`.
"""

import signal
import subprocess

import anyio
import msgspec
import pytest
from micro_guest import Work
from patience import HUNG

from vmibridge.backends.qemu.process import QemuProcess

pytestmark = pytest.mark.anyio
CPUID, VMCALL = 1, 2


class Polling:
    """The guest in QEMU, and the letters that it writes."""

    def __init__(self, machine, arguments, how):
        command = machine.command(arguments, guest="polling", options="-serial stdio", HOW=how)
        self.qemu = QemuProcess(command, stdout=subprocess.PIPE)

    async def __aenter__(self):
        await self.qemu.__aenter__()
        # A reset of a machine whose BIOS has not yet started the guest may leave it in the BIOS.
        assert await self.letter() == b"b"
        return self

    async def __aexit__(self, *how):
        return await self.qemu.__aexit__(*how)

    async def letter(self):
        return await self.qemu.process.stdout.receive(1)


@pytest.mark.parametrize(
    ("absent", "how", "without"),
    [
        ("native", CPUID, b"n"),
        ("native", VMCALL, b"u"),
        ("skip", CPUID, b"s"),
        ("skip", VMCALL, b"s"),
    ],
)
@pytest.mark.parametrize("inside", ["on", "off"])
async def test_a_poll_without_a_host_is_native_or_skipped(machine, absent, how, without, inside):
    arguments = f",absent={absent},inside={inside}"
    with anyio.fail_after(HUNG):
        async with Polling(machine, arguments, how) as guest:
            assert await guest.letter() == without
            for _ in range(2):
                async with machine.host(Work()) as server:
                    assert await guest.letter() == b"a"
                    server.stop()
                assert await guest.letter() == without


@pytest.mark.parametrize("how", [CPUID, VMCALL])
@pytest.mark.parametrize("inside", ["on", "off"])
async def test_a_poll_waits_for_a_host_and_sees_nothing_of_its_change(machine, how, inside):
    letters = []

    async def listen(guest):
        while True:
            letters.append(await guest.letter())

    with anyio.fail_after(HUNG):
        async with Polling(machine, f",absent=wait,inside={inside}", how) as guest:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen, guest)
                for _ in range(2):
                    work = Work()
                    async with machine.host(work) as server:
                        await work.begun.wait()
                        server.stop()
                tasks.cancel_scope.cancel()
            guest.qemu.process.kill()
    assert letters == [b"a"]


class Status(msgspec.Struct):
    status: str


async def end(qemu, way):
    if way == "quit":
        await qemu.qmp.execute("quit")
    else:
        qemu.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("way", ["quit", "SIGTERM"])
async def test_a_qemu_whose_vcpu_waits_for_a_host_can_be_ended(machine, way):
    with anyio.fail_after(HUNG):
        async with Polling(machine, ",absent=wait,patience=3000", VMCALL) as guest:
            await end(guest.qemu, way)
            assert await guest.qemu.wait() == 0


async def test_a_guest_whose_vcpu_waits_can_be_paused_reset_and_goes_on(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with Polling(machine, ",absent=wait,patience=3000", VMCALL) as guest:
            await guest.qemu.qmp.execute("stop")
            status = await guest.qemu.qmp.execute("query-status", Status)
            assert status.status == "paused"
            await guest.qemu.qmp.execute("cont")
            async with guest.qemu.qmp.events("RESET") as resets:
                await guest.qemu.qmp.execute("system_reset")
                await resets.receive()
            assert await guest.letter() == b"b"
            async with machine.host(work) as server:
                assert await guest.letter() == b"a"
                await work.begun.wait()
                server.stop()
            guest.qemu.process.kill()


@pytest.mark.parametrize("way", ["quit", "SIGTERM"])
async def test_a_qemu_whose_host_is_stopped_in_a_trap_can_be_ended(machine, way):
    """A host that has taken a trap and says no more: QEMU does not wait for it."""
    taken = anyio.Event()

    async def host(stream):
        async with stream:
            await stream.receive()
            numbers = (16, 20, 3, 14, 0, 1, 0x42494D56)
            await stream.send(b"".join(number.to_bytes(4, "little") for number in numbers))
            await stream.receive()
            taken.set()
            await anyio.sleep_forever()

    with anyio.fail_after(HUNG):
        listener = await anyio.create_unix_listener(machine.socket)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, host)
            async with Polling(machine, ",absent=wait,patience=3000", VMCALL) as guest:
                await taken.wait()
                await end(guest.qemu, way)
                assert await guest.qemu.wait() == 0
            tasks.cancel_scope.cancel()
