"""A guest in stock QEMU that calls through the PCI device, against the whole engine.

The guest checks the answers. `make qemu` brings a QEMU that has the device.
"""

import signal

import anyio
import pytest
from device_machine import FAULT, HOST_GONE, NO_ANSWER, DeviceMachine, mostly_asyncio
from micro_guest import ALL_RIGHT, ENDLESS, HOLD, NOT_ANSWERED, REVERSE, SLOW, OfAnother, Work
from needs import has_kvm
from patience import HUNG
from waiting import until

pytestmark = pytest.mark.anyio

MANY = 200_000
KVM = pytest.param("kvm", marks=[has_kvm, pytest.mark.slow])


@pytest.fixture(params=["tcg", KVM])
def machine(qemu, build_guest, tmp_path, request):
    return DeviceMachine(qemu, build_guest, tmp_path, request.param)


@mostly_asyncio
@pytest.mark.parametrize("user", [0, 1], ids=["ring0", "ring3"])
@pytest.mark.parametrize("cpus", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_each_call_is_answered(machine, user, cpus):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work, "kernel=0" if user else "kernel=2"):
            assert await machine.run(COUNT=100, CPUS=cpus, USER=user) == ALL_RIGHT
    assert machine.outcomes == {"handled": 100 * cpus}
    assert machine.ends == [(slot, "halted") for slot in range(cpus)]
    assert work.where == {("device", 0, 64, 3 if user else 0)}


@mostly_asyncio
@pytest.mark.no_cover
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "form"),
    [
        # Held for long: a busy machine does not make polls of these.
        pytest.param("kernel=8&hold=100ms", {}, id="ring0"),
        pytest.param("kernel=0&hold=100ms", {"USER": 1}, id="ring3"),
        pytest.param("kernel=8&hold=0s", {"HALT": 1}, id="MSI"),
    ],
)
async def test_many_thousand_calls(machine, options, form):
    with anyio.fail_after(MANY / 50):
        async with machine.host(Work(), options):
            assert await machine.run(COUNT=MANY, **form) == ALL_RIGHT
    assert machine.outcomes == {"handled": MANY}


@mostly_asyncio
@has_kvm
async def test_under_kvm_ring_3_calls(qemu, build_guest, tmp_path):
    """On microvm: where KVM is nested, an exit takes long, and q35's firmware makes too many."""
    machine = DeviceMachine(qemu, build_guest, tmp_path, "kvm")
    with anyio.fail_after(HUNG):
        async with machine.host(Work(), "kernel=0&hold=100ms"):
            assert await machine.run(machine="microvm", COUNT=300, USER=1) == ALL_RIGHT
    assert machine.outcomes == {"handled": 300}
    assert machine.events[0].ring == 3


@mostly_asyncio
async def test_microvm_has_the_device_too(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work(), "kernel=0&slots=3"):
            assert await machine.run(machine="microvm", COUNT=100) == ALL_RIGHT
    assert machine.outcomes == {"handled": 100}


@mostly_asyncio
async def test_a_call_that_is_rung_for_twice_is_made_once(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            assert await machine.run(COUNT=200, TWICE=1, STALE=1) == ALL_RIGHT
    assert machine.outcomes == {"handled": 200}


@mostly_asyncio
@pytest.mark.parametrize("share", ["on", "off", None], ids=["shared", "private", "no-file"])
async def test_a_handler_reads_and_writes_the_memory_of_the_guest(machine, share):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            assert await machine.run(METHOD=REVERSE, COUNT=50, share=share) == ALL_RIGHT
    assert machine.outcomes == {"handled": 50}


@mostly_asyncio
async def test_memory_is_asked_of_qemu_while_another_vcpu_calls(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            given = {"METHOD": REVERSE, "COUNT": 30, "CPUS": 2, "share": None}
            assert await machine.run(**given) == ALL_RIGHT
    assert machine.outcomes == {"handled": 60}


@mostly_asyncio
async def test_a_program_has_its_data_in_its_slot(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work(), "kernel=0"):
            given = {"METHOD": REVERSE, "COUNT": 50, "CPUS": 2, "USER": 1, "SPACE": 1}
            assert await machine.run(**given) == ALL_RIGHT
    assert machine.outcomes == {"handled": 100}


@mostly_asyncio
@pytest.mark.parametrize("space", [0, 2], ids=["physical", "made-up"])
async def test_nobody_reads_memory_that_no_kernel_vouches_for(machine, space):
    with anyio.fail_after(HUNG):
        async with machine.host(Work(), "kernel=4"):
            given = {"METHOD": REVERSE, "COUNT": 1, "FIRST": 4, "SPACE": space}
            assert await machine.run(**given) == NOT_ANSWERED
    assert machine.outcomes == {"failed": 1}
    assert machine.events[0].registers.cr3 == 0
    assert machine.events[0].ring == 3


@mostly_asyncio
@pytest.mark.parametrize("halt", [0, 1], ids=["polls", "waits for MSI"])
async def test_a_late_answer_holds_neither_the_vcpu_nor_the_monitor(machine, halt):
    work = Work()
    with anyio.fail_after(HUNG):
        async with (
            machine.host(work),
            machine.start(METHOD=SLOW, COUNT=5, HALT=halt) as qemu,
        ):
            await work.begun.wait()
            await qemu.qmp.execute("query-status")
            work.end.set()
            assert await qemu.wait() == ALL_RIGHT
    assert machine.outcomes == {"handled": 5}


@mostly_asyncio
async def test_a_slow_call_does_not_hold_the_calls_of_another_vcpu(machine):
    work = Work()

    async def invert_or_wait(vmi, packet):
        if vmi.vcpu == 0 and packet.value1 == 3:
            await work.begun.wait()
        return await Work.invert(work, vmi, packet)

    work.invert = invert_or_wait
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(COUNT=150, CPUS=2) == ALL_RIGHT
    assert work.calls == {0: 150, 1: 150}


@mostly_asyncio
async def test_what_is_not_ours_gets_no_answer(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(OfAnother()):
            assert await machine.run() == NO_ANSWER
    assert not machine.outcomes


@mostly_asyncio
async def test_a_host_that_stops_leaves_no_caller_without_a_word(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work) as server, machine.start(COUNT=ENDLESS) as qemu:
            await work.begun.wait()
            server.stop()
            assert await qemu.wait() in (NO_ANSWER, HOST_GONE)
    assert machine.ends == [(0, "stopped")]


@mostly_asyncio
async def test_a_stop_answers_the_call_that_is_open(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work) as server, machine.start(METHOD=SLOW, HALT=1) as qemu:
            await work.begun.wait()
            server.stop()
            assert await qemu.wait() in (NOT_ANSWERED, NO_ANSWER)
    assert machine.outcomes == {"cancelled": 1}


@mostly_asyncio
async def test_a_qemu_that_is_killed_with_a_call_open_is_lost(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work), machine.start(METHOD=HOLD) as qemu:
            await work.begun.wait()
            qemu.process.send_signal(signal.SIGKILL)
            await qemu.wait()
    assert machine.ends == [(0, "lost")]


@mostly_asyncio
async def test_a_call_that_is_cancelled_ends_its_handler(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            assert await machine.run(METHOD=SLOW, COUNT=1, CANCEL=1) == NOT_ANSWERED
    assert machine.outcomes == {"cancelled": 1}


@mostly_asyncio
async def test_a_guest_that_is_reset_calls_on(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work) as server, machine.start(COUNT=ENDLESS) as qemu:
            await work.begun.wait()
            await qemu.qmp.execute("system_reset")
            await work.again.wait()
            server.stop()
            assert await qemu.wait() != FAULT


@mostly_asyncio
async def test_a_reset_abandons_the_call_that_is_open(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work) as server, machine.start(METHOD=SLOW, COUNT=1) as qemu:
            await work.begun.wait()
            await qemu.qmp.execute("system_reset")
            await until(lambda: machine.outcomes["cancelled"])
            work.end.set()
            assert await qemu.wait() == ALL_RIGHT, "the guest of after the reset"
            server.stop()
    assert machine.outcomes == {"cancelled": 1, "handled": 1}


@mostly_asyncio
async def test_with_stay_one_qemu_comes_after_another(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work(), "kernel=1&stay=true") as server:
            assert await machine.run(COUNT=10) == ALL_RIGHT
            assert await machine.run(COUNT=10) == ALL_RIGHT
            server.stop()
    assert machine.outcomes == {"handled": 20}


@mostly_asyncio
async def test_a_second_qemu_at_the_same_time_is_turned_away(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work) as server, machine.start(COUNT=ENDLESS):
            await work.begun.wait()
            async with await anyio.connect_unix(machine.socket) as second:
                with pytest.raises(anyio.EndOfStream):
                    await second.receive()
            server.stop()
