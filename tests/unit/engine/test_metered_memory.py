"""Guest memory that is charged to a quota."""

import time

import pytest
from policy_parts import SPACE_BYTES, VM_BYTES, trap

from vmibridge.bridge.context import BridgeContext
from vmibridge.engine.access_policy import (
    Guard,
    MeteredMemory,
    Policy,
    Quota,
    Rate,
)
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

# --- metered memory -----------------------------------------------------------------


def metered(policy: Policy, memory: dict[int, bytes]) -> tuple[MeteredMemory, Guard, FakeBackend]:
    backend, guard = FakeBackend(memory=memory), Guard(policy)
    return MeteredMemory(backend, guard, time.monotonic), guard, backend


@pytest.mark.anyio
async def test_memory_is_passed_through_and_charged():
    memory, guard, backend = metered(
        Policy(vm=Quota(bytes=Rate(burst=10))), {0x5000: b"hello, world"}
    )
    event = trap()
    assert await memory.read_physical(event, 0x5000, 5) == b"hello"
    assert guard.denies(event, time.monotonic()) is None
    await memory.write_physical(event, 0x5000, b"HELLO")
    assert backend.memory[0x5000].startswith(b"HELLO, world")
    assert guard.denies(event, time.monotonic()) == VM_BYTES


@pytest.mark.anyio
async def test_it_is_charged_to_the_address_space_of_the_trap():
    memory, guard, _ = metered(Policy(address_space=Quota(bytes=Rate(burst=4))), {0x5000: b"hello"})
    await memory.read_physical(trap(0x1000), 0x5000, 4)
    assert guard.denies(trap(0x1000), time.monotonic()) == SPACE_BYTES
    assert guard.denies(trap(0x2000), time.monotonic()) is None


@pytest.mark.anyio
async def test_an_access_that_fails_is_charged():
    memory, guard, _ = metered(Policy(vm=Quota(bytes=Rate(burst=4))), {})
    with pytest.raises(GuestMemoryError):
        await memory.write_physical(trap(), 0x5000, b"1234")
    assert guard.denies(trap(), time.monotonic()) == VM_BYTES


@pytest.mark.anyio
async def test_page_tables_on_the_way_are_charged():
    # 4 levels of 8 bytes, each table with one entry, then the data.
    tables = {level << 12: (level + 1 << 12 | 7).to_bytes(8, "little") for level in range(1, 5)}
    registers = Registers(cr0=1 << 31, cr3=0x1000, cr4=1 << 5, efer=1 << 10)
    event = TrapEvent(1, TrapReason.VMCALL, registers, length=3)
    for burst, denied in ((4 * 8 + 5, VM_BYTES), (4 * 8 + 6, None)):
        memory, guard, _ = metered(
            Policy(vm=Quota(bytes=Rate(burst))), {**tables, 0x5000: b"hello"}
        )
        assert await BridgeContext(event, memory).memory.read(0, 5) == b"hello"
        assert guard.denies(event, time.monotonic()) == denied
