"""Several files at once: of several vCPUs in one guest, and of two guests with one folder."""

import anyio
import pytest
from file_parts import BEGIN, END, GET, PUT, noise, sha256, tree

from vmibridge import STANDARD_MAGIC, Bridge, BridgePacket, BridgeServer, OutcomeKind, Status
from vmibridge.handlers.files import Files, Mode
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio
VCPUS, FILES, PIECE = 2, 4, 20_000


def memory_of(prefix: str) -> dict[int, bytes]:
    """For each vCPU names, hashes, what is in the files, and room for it."""
    memory = {}
    for number in range(VCPUS * FILES):
        data = noise(50_000 + number, number)
        memory[0x1_0000 + number * 0x100] = f"{prefix}/{number}".encode() + b"\0"
        memory[0x2_0000 + number * 0x100] = sha256(data)
        memory[0x10_0000 + number * 0x1_0000] = data
        memory[0x20_0000 + number * 0x1_0000] = bytes(len(data))
    return memory


async def guest_of(vm: FakeGuest) -> None:
    """Each vCPU has its files under way side by side, a piece of each in turn."""

    async def vcpu(which: int) -> None:
        async def call(method: int, *values: int) -> int:
            packet = BridgePacket(STANDARD_MAGIC, Files.REQUEST, method, *values)
            answer = await vm.call(packet, vcpu=which, address_space=0x1000)
            assert Status.decode(answer.rax) == Status(method)
            return answer.rbx

        numbers = range(which * FILES, which * FILES + FILES)
        names = {number: 0x1_0000 + number * 0x100 for number in numbers}
        for mode, step, base in ((Mode.CREATE, PUT, 0x10_0000), (Mode.READ, GET, 0x20_0000)):
            sizes = {number: 50_000 + number if step == PUT else 0 for number in numbers}
            handles = {
                number: await call(BEGIN, names[number], sizes[number], mode | Mode.HASH)
                for number in numbers
            }
            for at in range(0, 50_000 + VCPUS * FILES, PIECE):
                for number in numbers:
                    size = min(PIECE, 50_000 + number - at)
                    address = base + number * 0x1_0000 + at
                    assert await call(step, handles[number], at, address, size) == size
            for number in numbers:
                await call(END, handles[number], 0x2_0000 + number * 0x100, 32)

    async with anyio.create_task_group() as tasks:
        for which in range(VCPUS):
            tasks.start_soon(vcpu, which)


async def serve(folder, prefix: str, options: dict[str, object]) -> None:
    async with FakeGuest(guest_of, memory=memory_of(prefix), vm=prefix) as backend:
        settings = Files.Settings(str(folder), sync=False)
        server = BridgeServer(backend, Bridge(Files(settings)), **options)
        async for outcome in server.run():
            assert outcome.kind in (OutcomeKind.HANDLED, OutcomeKind.WAITING), outcome
        for number in range(VCPUS * FILES):
            room = backend.memory[0x20_0000 + number * 0x1_0000]
            assert room == noise(50_000 + number, number)


def all_files(*prefixes: str) -> dict[str, bytes | None]:
    numbers = range(VCPUS * FILES)
    found = {f"{each}/{n}": noise(50_000 + n, n) for each in prefixes for n in numbers}
    return {**dict.fromkeys(prefixes), **found}


async def test_eight_files_over_two_vcpus(tmp_path, anyio_backend):
    await serve(tmp_path, "a", {})
    assert tree(tmp_path) == all_files("a")


async def test_two_guests_put_into_one_folder(tmp_path, anyio_backend):
    async with anyio.create_task_group() as tasks:
        for prefix in ("a", "b"):
            tasks.start_soon(serve, tmp_path, prefix, {})
    assert tree(tmp_path) == all_files("a", "b")
