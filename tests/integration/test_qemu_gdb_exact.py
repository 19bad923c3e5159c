"""An answered trap changes the answer's registers and the instruction pointer, and nothing else.

The guest of `guests/exact.asm` checks it, under TCG. What KVM does not let the stub do is in
docs/qemu-gdb.md.
"""

import struct

import anyio
import pytest
from gdb_machine import machine_of
from micro_guest import ALL_RIGHT, CPUID, VMCALL, VMMCALL, Work
from patience import HUNG

pytestmark = pytest.mark.anyio

RFLAGS_RF = 1 << 16
BASE, OTHER_BASE, TF, SHADOW, RF, REWRITTEN, TF_NATIVE, KICKED = range(1, 9)


@pytest.fixture(params=["system", "new"])
def machine(request, build_guest, tmp_path):
    return machine_of(request.param, request, build_guest, tmp_path)


async def run(machine, build_guest, handler, **defines):
    image = build_guest("exact", **defines)
    machine.sites = list(dict.fromkeys(struct.unpack_from("<2I", image.read_bytes(), 32)))
    if defines["CASE"] in (BASE, OTHER_BASE, SHADOW, REWRITTEN, KICKED):
        machine.sites.pop()
    with anyio.fail_after(HUNG):
        async with machine.booted("-S", "-kernel", str(image)), machine.host(handler):
            pass
    return machine.status


all_instructions = pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL])


@all_instructions
async def test_a_site_is_a_linear_address_in_a_segment_with_a_base(machine, build_guest, how):
    assert await run(machine, build_guest, Work(), CASE=BASE, HOW=how) == ALL_RIGHT
    assert machine.outcomes == {"handled": 100}
    assert {event.ip for event in machine.events} == {machine.sites[0] - 0x10_0000}
    assert {event.width for event in machine.events} == {32}


async def test_a_selector_that_gets_another_base_is_looked_up_again(machine, build_guest):
    assert await run(machine, build_guest, Work(), CASE=OTHER_BASE) == ALL_RIGHT
    assert machine.outcomes == {"handled": 200}
    offset = machine.sites[0] - 0x10_0000
    assert {event.ip for event in machine.events} == {offset, offset + 0x1000}


async def test_code_that_the_guest_rewrites_is_read_again(machine, build_guest):
    assert await run(machine, build_guest, Work(), CASE=REWRITTEN) == ALL_RIGHT
    assert [event.length for event in machine.events] == [3, 4]


@all_instructions
async def test_a_single_step_of_the_guest_ends_behind_an_answered_trap(machine, build_guest, how):
    assert await run(machine, build_guest, Work(), CASE=TF, HOW=how) == ALL_RIGHT
    assert machine.outcomes["handled"] == 1


@all_instructions
async def test_and_behind_one_that_runs_natively(machine, build_guest, how):
    assert await run(machine, build_guest, Work(), CASE=TF_NATIVE, HOW=how) == ALL_RIGHT
    assert not machine.outcomes


@all_instructions
async def test_an_interrupt_comes_behind_a_trap_that_follows_sti(machine, build_guest, how):
    assert await run(machine, build_guest, Work(), CASE=SHADOW, HOW=how) == ALL_RIGHT
    assert machine.outcomes == {"handled": 1}


@pytest.mark.slow
async def test_a_step_that_a_kick_of_the_vcpu_ends_before_its_instruction_is_done_again(
    machine, build_guest
):
    """QEMU reports it as the end of the step. The trap would come again, with its answer for a
    question."""
    assert await run(machine, build_guest, Work(), CASE=KICKED) == ALL_RIGHT
    assert machine.outcomes == {"handled": 200}


@all_instructions
async def test_the_resume_flag_is_clear_behind_a_trap(machine, build_guest, how):
    assert await run(machine, build_guest, Work(), CASE=RF, HOW=how) == ALL_RIGHT
    assert [bool(event.registers.rflags & RFLAGS_RF) for event in machine.events] == [True, False]


async def test_a_boot_sector_at_07c0_goes_on_behind_its_trap(machine, build_guest):
    image = build_guest("boot_sector")
    (offset,) = struct.unpack_from("<H", image.read_bytes(), 508)
    machine.sites = [0x7C00 + offset]
    disk = f"file={image},format=raw,if=floppy"
    with anyio.fail_after(HUNG):
        async with machine.booted("-S", "-drive", disk), machine.host(Work()):
            pass
    assert machine.status == ALL_RIGHT
    assert [(event.ip, event.width) for event in machine.events] == [(offset, 16)]
