"""Programs of a real Linux call by the device, through sysfs and by the driver (ivshmem)."""

from collections import Counter
from dataclasses import dataclass

import anyio
import pytest
from children import run_beside
from device_guests import SLOTS, ivshmem
from linux_guest import LIMIT, LinuxGuest, booted, built_guest, exchange

from vmibridge import Bridge, BridgeServer, open_backend

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

COUNT = 50
PROGRAMS = 8


@dataclass
class DeviceLinux:
    """The Linux guest in a QEMU with the device."""

    guest: LinuxGuest
    machine: str = "q35"

    async def boot(self, what, *extra, options="", device=ivshmem, **kernel):
        """What came of it, and the outcomes by their kind."""
        socket, kinds = self.guest.place / "s", Counter()
        command = self.guest.command(what, *extra, *device(socket), count=COUNT, **kernel)
        command[command.index("-M") + 1] = self.machine
        async with open_backend(f"ivshmem:unix:{socket}?slots={SLOTS}{options}") as backend:
            server = BridgeServer(backend, Bridge(exchange()), timeout=30)

            async def consume():
                async for outcome in server.run():
                    kinds[outcome.kind.value] += 1

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                with anyio.fail_after(LIMIT):
                    done = await run_beside(command)
                if not kinds:
                    server.stop()
        return booted(done.returncode, done.stdout), kinds


@pytest.fixture
def linux(any_qemu, tmp_path):
    return DeviceLinux(LinuxGuest(any_qemu, tmp_path, built_guest(), tmp_path))


def told(how, uid, number):
    return [f"device {how} uid {uid} slot {{}}: right, {COUNT} calls"] * number


def without_slots(lines):
    """The lines of programs, and the slots that they had."""
    words = [line.split(" ") for line in lines if line.startswith("device ")]
    slots = [int(each[5].rstrip(":")) for each in words]
    return [" ".join([*each[:5], "{}:", *each[6:]]) for each in words], slots


async def test_root_and_a_plain_user_call_through_sysfs_and_by_the_driver_eight_at_once(linux):
    boot, kinds = await linux.boot("sysfs,driver")
    assert boot.lines[-1] == "all right", boot.lines
    lines, slots = without_slots(boot.lines)
    assert lines == [
        each for how in ("sysfs", "driver") for each in told(how, 0, 1) + told(how, 1000, PROGRAMS)
    ]
    # Those that ran at a time had a slot each.
    assert all(0 <= slot < SLOTS for slot in slots)
    assert kinds["handled"] == 2 * (1 + PROGRAMS) * (5 + COUNT + 2)
    assert set(kinds) <= {"handled", "waiting"}


async def test_a_guest_without_the_device_says_so(linux):
    boot, _ = await linux.boot("sysfs", device=lambda socket: [])
    assert boot.lines[-1] == "WRONG"
    assert {line for line in boot.lines if line.startswith("device")} == {
        f"device sysfs uid {uid} slot 0: WRONG: No such device, {COUNT} calls" for uid in (0, 1000)
    }
