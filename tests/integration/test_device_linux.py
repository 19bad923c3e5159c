"""Programs of a real Linux call by the device, through sysfs and by the driver: both carriers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from children import run_beside
from device_guests import CARRIERS, SLOTS, shared_memory
from linux_guest import LIMIT, LinuxGuest, booted, built_guest, exchange
from needs import needs

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
    carrier: str

    async def boot(self, what, *, kernel=0, has_device=True):
        """What came of it, and the outcomes by their kind. With `kernel`, memory is shared."""
        place, kinds = self.guest.place, Counter()
        socket = place / "s"
        spec = f"{self.carrier}:unix:{socket}?slots={SLOTS + kernel}&kernel={kernel}"
        file = place / "ram" if self.carrier == "ivshmem" else Path()
        if kernel and self.carrier == "ivshmem":
            spec += f"&memory={file}"
        extra = shared_memory(file, 256, "q35") if kernel else ("-M", "q35")
        device = CARRIERS[self.carrier](socket, SLOTS + kernel) if has_device else []
        command = self.guest.command(what, *extra, *device, count=COUNT)
        async with open_backend(spec) as backend:
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


@pytest.fixture(params=["ivshmem-system", "ivshmem-new", "vfio-user-new"])
def linux(request, tmp_path):
    carrier, _, which = request.param.rpartition("-")
    is_new = which == "new"
    qemu = request.getfixturevalue("qemu") if is_new else needs("qemu-system-x86_64")
    return DeviceLinux(LinuxGuest(qemu, tmp_path, built_guest(), tmp_path), carrier)


def told(how, uid, number):
    return [f"device {how} uid {uid} slot {{}}: right, {COUNT} calls"] * number


def without_slots(lines):
    """The lines of programs, and the slots that they had."""
    words = [line.split(" ") for line in lines if line.startswith("device ")]
    slots = [int(each[5].rstrip(":")) for each in words]
    return [" ".join([*each[:5], "{}:", *each[6:]]) for each in words], slots


@pytest.mark.parametrize(
    ("ways", "kernel"),
    [(("sysfs", "driver"), 0), (("sysfs", "driver", "shared"), 2)],
    ids=["copied", "shared"],
)
async def test_root_and_a_plain_user_call_eight_at_once(linux, ways, kernel):
    """With buffers that are copied through the slot, and with memory of the programs' own: for that
    the driver is loaded once more, to a device that programs had enabled through sysfs before."""
    boot, kinds = await linux.boot(",".join(ways), kernel=kernel)
    assert boot.lines[-1] == "all right", boot.lines
    lines, slots = without_slots(boot.lines)
    assert lines == [each for how in ways for each in told(how, 0, 1) + told(how, 1000, PROGRAMS)]
    # Those that are the kernel's are given to nobody.
    assert all(kernel <= slot < SLOTS + kernel for slot in slots)
    assert kinds["handled"] == len(ways) * (1 + PROGRAMS) * (5 + COUNT + 2)
    assert set(kinds) <= {"handled", "waiting"}


async def test_memory_is_not_shared_with_a_host_that_believes_no_space(linux):
    boot, _ = await linux.boot("shared")
    assert boot.lines[-1] == "WRONG"
    assert {line.partition("WRONG: ")[2] for line in boot.lines if "shared uid" in line} == {
        f"Operation not supported, {COUNT} calls"
    }


async def test_a_guest_without_the_device_says_so(linux):
    boot, _ = await linux.boot("sysfs", has_device=False)
    assert boot.lines[-1] == "WRONG"
    assert {line for line in boot.lines if line.startswith("device")} == {
        f"device sysfs uid {uid} slot 0: WRONG: No such device, {COUNT} calls" for uid in (0, 1000)
    }
