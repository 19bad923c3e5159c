"""Guest memory is that of a trap: out of reach behind its answer, there again with the next one."""

import anyio
import pytest
from anyio.lowlevel import checkpoint
from msgspec import structs
from paged_memory import FIRST, FRAMES, PAGE, PATTERN, by_either, event_of, paged, refused, unpaged

from vmibridge.bridge.context import BridgeContext
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

# --- for one trap only --------------------------------------------------------------


@pytest.mark.anyio
@by_either
async def test_after_the_answer_guest_memory_is_out_of_reach(access):
    for vmi, vm in (paged(), unpaged({FIRST: bytes(PAGE)})):
        memory = vmi.memory
        before = {start: bytes(region) for start, region in vm.memory.regions.items()}
        assert await memory.read(FIRST, 4) == bytes(4)
        vmi.close()
        with refused(FIRST, "the trap is answered: the guest runs again"):
            await access(memory, FIRST)
        assert before == {start: bytes(region) for start, region in vm.memory.regions.items()}


@pytest.mark.anyio
async def test_a_context_whose_memory_was_never_used_closes_it_too():
    vmi, _ = paged()
    vmi.close()
    with refused(FIRST, "the trap is answered"):
        await vmi.memory.read(FIRST, 0)


class Answering(FakeBackend):
    """A backend whose trap is answered during the access that `answer_at` says."""

    context: BridgeContext
    accesses = 0
    answer_at = 0

    def count(self) -> None:
        self.accesses += 1
        if self.accesses == self.answer_at:
            self.context.close()

    async def read_physical(self, event, address, size):
        self.count()
        return await super().read_physical(event, address, size)

    async def write_physical(self, event, address, data):
        self.count()
        await super().write_physical(event, address, data)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "access",
    [
        lambda memory: memory.read(FIRST, 3 * PAGE),
        lambda memory: memory.write(FIRST, bytes(3 * PAGE)),
        lambda memory: memory.read_string(FIRST, 3 * PAGE),
        lambda memory: memory.read_utf16(FIRST, 3 * PAGE),
    ],
    ids=["read", "write", "read_string", "read_utf16"],
)
async def test_an_answer_that_comes_in_between_ends_the_access(access):
    full = dict.fromkeys(FRAMES.values(), b"x" * PAGE)
    vmi, vm = paged(full, backend=Answering)
    await access(vmi.memory)
    for step in range(1, vm.accesses):
        vmi, vm = paged(full, backend=Answering)
        vm.context, vm.answer_at = vmi, step
        with pytest.raises(GuestMemoryError, match="the trap is answered"):
            await access(vmi.memory)
        assert vm.accesses == step, "reached guest memory after the answer"


# --- for one trap, and then for the next --------------------------------------------

ACCESSES = {
    "read": lambda memory: memory.read(FIRST, 3 * PAGE),
    "write": lambda memory: memory.write(FIRST, PATTERN[: 3 * PAGE]),
    "read_string": lambda memory: memory.read_string(FIRST, 3 * PAGE),
    "read_utf16": lambda memory: memory.read_utf16(FIRST, 3 * PAGE),
    "read_physical": lambda memory: memory.read_physical(0x9_0000, 4),
    "write_physical": lambda memory: memory.write_physical(0x9_0000, b"data"),
}
every_access = pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)


class Leaving(FakeBackend):
    """A backend whose trap leaves during the access that `leave_at` says."""

    context: BridgeContext
    leave_at = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seqs: list[int] = []

    def count(self, event) -> None:
        self.seqs.append(event.seq)
        if len(self.seqs) == self.leave_at:
            self.context.park()

    async def read_physical(self, event, address, size):
        self.count(event)
        return await super().read_physical(event, address, size)

    async def write_physical(self, event, address, data):
        self.count(event)
        await super().write_physical(event, address, data)


async def settle():
    for _ in range(5):
        await checkpoint()


@pytest.mark.anyio
@every_access
async def test_an_access_waits_from_the_soft_deadline_to_the_retry(access):
    vmi, vm = paged(dict.fromkeys(FRAMES.values(), b"x" * PAGE), backend=Leaving)
    vmi.park()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(access, vmi.memory)
        await settle()
        assert vm.seqs == [], "the guest runs"
        vmi.attach(structs.replace(vmi.event, seq=2))
    assert set(vm.seqs) == {2}
    assert vmi.event.seq == 2


@pytest.mark.anyio
@every_access
async def test_an_access_that_the_trap_leaves_is_done_anew_with_the_next_one(access):
    """In another address space, in the extreme: nothing that was translated is used again."""
    full = dict.fromkeys(FRAMES.values(), b"x" * PAGE)
    vmi, vm = paged(full, backend=Leaving)
    await access(vmi.memory)
    whole = len(vm.seqs)
    for step in range(1, whole):
        vmi, vm = paged(full, backend=Leaving)
        vm.context, vm.leave_at = vmi, step
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(access, vmi.memory)
            await settle()
            assert vm.seqs == [1] * step, "the guest runs"
            vmi.attach(structs.replace(vmi.event, seq=2))
        assert vm.seqs == [1] * step + [2] * whole


@pytest.mark.anyio
async def test_what_is_read_is_never_of_two_traps():
    vmi, vm = paged(dict.fromkeys(FRAMES.values(), b"x" * PAGE), backend=Leaving)
    vm.context, vm.leave_at = vmi, 5 + 5  # the second page: four steps of the walk, one read
    found = []

    async def read():
        found.append(await vmi.memory.read(FIRST, 3 * PAGE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await settle()
        for frame in FRAMES.values():
            vm.memory.write(frame, b"y" * PAGE)
        vmi.attach(structs.replace(vmi.event, seq=2))
    assert found == [b"y" * 3 * PAGE]


@pytest.mark.anyio
@every_access
async def test_an_access_that_waits_fails_when_no_trap_will_come(access):
    vmi, vm = paged(backend=Leaving)
    vmi.park()
    failed = []

    async def fail():
        with pytest.raises(GuestMemoryError, match="the trap is answered"):
            await access(vmi.memory)
        failed.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await settle()
        vmi.close()
    assert (failed, vm.seqs) == ([True], [])


@pytest.mark.anyio
async def test_it_is_settled_when_no_access_is_under_way():
    reading, read_on = anyio.Event(), anyio.Event()

    class Slow(FakeBackend):
        async def read_physical(self, event, address, size):
            reading.set()
            await read_on.wait()
            return await super().read_physical(event, address, size)

    vm = Slow(memory={0x1000: b"data"})
    vmi = BridgeContext(event_of(Registers()), vm)
    done = []

    async def settled():
        await vmi.memory.settled()
        done.append(True)

    await settled()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(vmi.memory.read, 0x1000, 4)
        await reading.wait()
        vmi.park()
        tasks.start_soon(settled)
        await settle()
        assert done == [True]
        read_on.set()
    assert done == [True, True]


def test_a_context_has_one_memory_and_tells_of_its_trap():
    event = TrapEvent(7, TrapReason.CPUID, Registers(cr3=0x5000), vm="a", vcpu=3)
    vmi = BridgeContext(event, FakeBackend())
    assert vmi.memory is vmi.memory
    assert (vmi.event, vmi.vm, vmi.vcpu) == (event, "a", 3)
    assert vmi.event.address_space == 0x5000
