"""A trap changes the answer and nothing else, in whatever state of the CPU: `guests/states.asm`.

The guest compares flags, registers, single steps, interrupts and breakpoints with what the hardware
leaves behind an instruction, and says by name what is right.
"""

import re
from contextlib import suppress

import anyio
import pytest
from patience import HUNG

from vmibridge import BridgeHandler, BridgeResponse, TrapReason
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.errors import QmpError

pytestmark = [
    pytest.mark.anyio,
    # The guest is the same on each loop, and none of the loops is what is tested.
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

CPUID, VMCALL, VMMCALL = 1, 2, 3
MASK = {64: (1 << 64) - 1, 32: (1 << 32) - 1}
ALL_RIGHT = 33
ARITHMETIC = 0xCD5
CALLS = """
carry, no carry, direction, zero, less, overflow, decrement keeps carry, shift, answer, the others,
steps, their number, step in DR6, step behind mov ss, interrupt behind sti, RF, rex before a prefix,
rex twice, lock, alias, end of a page, its flags, across pages, its flags, many in a block, ring 3,
32 bits, 32 bits with a base
"""
CASES = [" ".join(case.split()) for case in CALLS.split(",")]
LOST_OUTSIDE = {
    *("less", "overflow", "decrement keeps carry", "shift", "many in a block"),
    *("steps", "their number", "step behind mov ss", "interrupt behind sti", "RF"),
}
"""What VMCALL and VMMCALL lose in a QEMU that exports no functions: docs/qemu-plugin.md says so."""


class Witness(BridgeHandler[None]):
    """Each trap says in value1 where it is."""

    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100
    VERIFY_VALUE3, VERIFY_VALUE4 = STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

    def __init__(self):
        self.events = []
        self.wrong = []

    async def handle(self, vmi, packet):
        self.events.append(vmi.event)
        if vmi.event.ip != packet.value1 or vmi.event.registers.rip != packet.value1:
            self.wrong.append(vmi.event)
        return BridgeResponse(~packet.value1 & MASK[vmi.event.width])


async def results(machine, witness, arguments="", **given):
    """What the guest says of each case, in its order."""
    with anyio.fail_after(HUNG):
        async with machine.host(witness):
            options = "-serial stdio"
            assert (
                await machine.run(arguments, guest="states", options=options, **given) == ALL_RIGHT
            )
    told = machine.done.stdout.decode()
    lines = [line.split(": ", 1) for line in told.splitlines()]
    assert lines.pop() == ["16 bits", "over"], told
    assert [name for name, _ in lines] == CASES, told
    return [name for name, verdict in lines if verdict != "ok"]


@pytest.mark.parametrize("kind", [CPUID, VMCALL, VMMCALL])
async def test_a_trap_leaves_what_the_hardware_leaves(machine, kind):
    witness = Witness()
    assert await results(machine, witness, KIND=kind) == []
    assert witness.wrong == []
    shown = [event.registers.rflags & ARITHMETIC for event in witness.events[:7]]
    assert shown == [0x45, 0x44, 0x445, 0x44, 0x95, 0x885, 0x45]
    assert all(event.flags_known for event in witness.events)
    reason = (TrapReason.CPUID, TrapReason.VMCALL, TrapReason.VMMCALL)[kind - 1]
    assert {event.reason for event in witness.events} == {reason}
    last = [(event.width, event.ring) for event in witness.events[-3:]]
    assert last == [(64, 3), (32, 3), (32, 3)]
    # 16-bit code has no form in the protocol: it is told, and not answered.
    assert machine.outcomes == {"handled": len(witness.events), "failed": 1}


@pytest.mark.parametrize("options", ["-icount shift=0", "-accel tcg,one-insn-per-tb=on"])
async def test_it_does_in_other_modes_of_the_translator(machine, options):
    witness = Witness()
    with anyio.fail_after(HUNG):
        async with machine.host(witness):
            more = f"-serial stdio {options}"
            assert await machine.run(guest="states", options=more, KIND=VMCALL) == ALL_RIGHT
    assert not re.search("WRONG|fault", machine.done.stdout.decode())
    assert witness.wrong == []


async def test_by_the_plugin_api_alone_cpuid_is_exact(machine):
    witness = Witness()
    assert await results(machine, witness, ",inside=off", KIND=CPUID) == []
    assert witness.wrong == []
    assert not any(event.flags_known for event in witness.events)


@pytest.mark.parametrize("kind", [VMCALL, VMMCALL])
async def test_by_the_plugin_api_alone_hypercalls_say_that_flags_are_not_known(machine, kind):
    witness = Witness()
    assert set(await results(machine, witness, ",inside=off", KIND=kind)) <= LOST_OUTSIDE
    assert witness.wrong == []
    assert not any(event.flags_known for event in witness.events)


class Stopped(BridgeHandler[None]):
    """Another client stops the VM in a trap, so its vCPU leaves QEMU's loop behind it."""

    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100

    def __init__(self):
        self.qemu, self.tasks, self.stops = None, None, 0

    async def handle(self, vmi, packet):
        self.tasks.start_soon(self._stop_and_go_on)
        await anyio.sleep(0.2)
        return BridgeResponse(1)

    async def _stop_and_go_on(self):
        # Where this process stands still, the last answer may be there before, and QEMU ends.
        with suppress(QmpError):
            await self.qemu.qmp.execute("stop")
            self.stops += 1
            await self.qemu.qmp.execute("cont")


@pytest.mark.parametrize("inside", ["on", "off"])
@pytest.mark.parametrize("kind", [VMCALL, VMMCALL])
async def test_flags_of_the_system_stay_when_a_vcpu_is_stopped_in_a_trap(
    machine, tmp_path, inside, kind
):
    """An operand of a comparison became EFLAGS, with TF, VM and IOPL, and the guest was reset."""
    said = tmp_path / "said"
    options = f"-serial file:{said} -no-reboot"
    handler = Stopped()
    with anyio.fail_after(HUNG):
        async with anyio.create_task_group() as handler.tasks, machine.host(handler):
            command = machine.start(f",inside={inside}", guest="kicked", options=options, KIND=kind)
            async with command as handler.qemu:
                assert await handler.qemu.wait() == ALL_RIGHT
            handler.tasks.cancel_scope.cancel()
    assert said.read_text() == "ok\n" * 4 + "over\n"
    assert handler.stops > 0


async def test_a_width_that_cannot_be_known_is_told_once_and_not_guessed(machine):
    """16-bit code in protected mode, by the plugin API alone."""
    witness = Witness()
    await results(machine, witness, ",inside=off", KIND=CPUID)
    assert {event.width for event in witness.events} == {64, 32}
    assert machine.done.stderr.decode().count("cannot be known here: it runs natively") == 1
    assert "failed" not in machine.outcomes
