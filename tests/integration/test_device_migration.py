"""QEMU refuses to migrate a guest that has the device, whose state does not go with it."""

import pytest
from device_guests import CallingMachine
from linux_guest import exchange
from needs import needs

from vmibridge import open_backend
from vmibridge.backends.device.migration import BLOCKER_NAME, blocker_arguments, write_blocker
from vmibridge.backends.qemu.process import QemuProcess
from vmibridge.errors import QmpError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]
MIGRATION = {"uri": "exec:cat >/dev/null"}


@pytest.mark.parametrize(
    ("carrier", "system", "reason"),
    [
        ("ivshmem", True, "ivshmem"),
        ("ivshmem", False, "ivshmem"),
        ("vfio-user", False, BLOCKER_NAME),
    ],
)
async def test_qemu_refuses_and_names_what_to_unplug(request, tmp_path, carrier, system, reason):
    qemu = needs("qemu-system-x86_64") if system else request.getfixturevalue("qemu")
    machine = CallingMachine(qemu, tmp_path, carrier)
    extra = []
    if carrier == "vfio-user":
        write_blocker(tmp_path / "image.vdi")
        extra = blocker_arguments(tmp_path / "image.vdi")
    command = machine.command(tmp_path / "none", *extra)
    at = command.index("-kernel")
    command[at : at + 2] = ["-S"]
    async with (
        open_backend(machine.spec) as backend,
        machine.served(backend, exchange()),
        QemuProcess(command) as process,
    ):
        assert process.qmp is not None
        with pytest.raises(QmpError, match=reason):
            await process.qmp.execute("migrate", **MIGRATION)
        if carrier == "vfio-user":
            await process.qmp.execute("blockdev-del", node_name=BLOCKER_NAME)
            await process.qmp.execute("migrate", **MIGRATION)
        # The guest has not begun: a QEMU that ends before it has read all of its greeting is taken
        # for one that only looked whether somebody listens, and the run would go on.
        backend.stop()
