"""Real guests put a file and get it again: emulated in the process, and in QEMU by the plugin."""

import struct

import anyio
import pytest
from file_parts import tree
from patience import HUNG
from served_machine import shared_ram_reads

from vmibridge import Bridge, BridgeServer, OutcomeKind, open_backend
from vmibridge.handlers.files import Files

pytestmark = pytest.mark.anyio
PASSED = 0x600D
KIB = 1 << 10
SIZES = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1]


def counted(size):
    """What the guest puts."""
    numbers = range(-(-size // 8))
    return struct.pack(f"<{len(numbers)}Q", *numbers)[:size]


def files(folder):
    return Files(Files.Settings(str(folder), replace=True, sync=False))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("small", [0, 1], ids=["large pages", "small pages"])
async def test_a_guest_puts_a_file_and_gets_it(build_guest, tmp_path, anyio_backend, size, small):
    folder = tmp_path / "folder"
    folder.mkdir()
    image = build_guest("files", UNICORN=1, SIZE=size, PIECE=20_000, SMALL=small, ROUNDS=2)
    async with open_backend(f"unicorn:{image}?memory=16MiB") as backend:
        server = BridgeServer(backend, Bridge(files(folder)), timeout=60)
        async for outcome in server.run():
            assert outcome.kind is OutcomeKind.HANDLED, outcome
        (end,) = server.summary.guest.vcpus
        assert end.registers["rax"] == PASSED
    assert tree(folder) == {"file.bin": counted(size)}


async def test_a_guest_that_is_told_to_wait_asks_again(build_guest, tmp_path, anyio_backend):
    folder = tmp_path / "folder"
    folder.mkdir()
    image = build_guest("files", UNICORN=1, SIZE=50_000, PIECE=10_000)
    kinds = set()
    async with open_backend(f"unicorn:{image}?memory=16MiB") as backend:
        server = BridgeServer(backend, Bridge(files(folder)), timeout=60, soft_timeout=0.00001)
        async for outcome in server.run():
            kinds.add(outcome.kind)
        (end,) = server.summary.guest.vcpus
        assert end.registers["rax"] == PASSED
    assert kinds == {OutcomeKind.HANDLED, OutcomeKind.WAITING}
    assert tree(folder) == {"file.bin": counted(50_000)}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "plugin"])
async def test_a_guest_in_qemu_does_the_same(machine, tmp_path, monkeypatch, shared):
    folder = tmp_path / "folder"
    folder.mkdir()
    known, size = shared_ram_reads(monkeypatch), 300_000
    arguments, options = "", ""
    if shared:
        options = (
            f"-object memory-backend-file,id=ram,size=32M,mem-path={tmp_path}/ram,share=on"
            " -machine memory-backend=ram"
        )
        arguments = f",ram={tmp_path}/ram"
    with anyio.fail_after(HUNG):
        async with machine.host(files(folder)):
            command = {"guest": "files", "SIZE": size, "PIECE": 1 << 20, "SMALL": 1}
            assert await machine.run(arguments, options=options, **command) == 33
    assert set(machine.outcomes) == {"handled"}
    assert tree(folder) == {"file.bin": counted(size)}
    assert bool(known) is shared
