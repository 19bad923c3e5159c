"""A guest in a real QEMU, by its gdbstub, against the whole engine. The guest checks the answers.

Debian's QEMU 7.2 and the QEMU of `make qemu` under TCG; KVM where it can be had. In CI all but
KVM have to be there; elsewhere the tests of a QEMU are skipped without it.
"""

import signal

import anyio
import pytest
from gdb_machine import machine_of
from micro_guest import (
    ALL,
    ALL_RIGHT,
    CPUID,
    ENDLESS,
    HOLD,
    NOT_ANSWERED,
    REVERSE,
    VMCALL,
    OfAnother,
    Work,
)
from patience import HUNG
from served_machine import shared_ram_reads

from vmibridge import open_backend
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["system", "new", "kvm"])
def machine(request, build_guest, tmp_path):
    return machine_of(request.param, request, build_guest, tmp_path)


# With KVM no VMCALL raises #UD.
under_tcg = pytest.mark.parametrize("machine", ["system", "new"], indirect=True)


@pytest.mark.parametrize("cpus", [1, 2])
async def test_every_trap_instruction_of_every_vcpu_is_answered(machine, cpus):
    work = Work()
    with anyio.fail_after(HUNG):
        assert await machine.run(work, HOW=ALL, CPUS=cpus, COUNT=90) == ALL_RIGHT
    assert machine.outcomes == {"handled": 90 * cpus}
    assert work.calls == dict.fromkeys(range(cpus), 90)
    assert machine.ends == [(vcpu, "halted") for vcpu in range(cpus)]
    assert work.where == {("cpuid", 3, 64, 0), ("vmcall", 4, 64, 0), ("vmmcall", 4, 64, 0)}


async def test_a_handler_reads_and_writes_the_memory_of_the_guest(machine):
    with anyio.fail_after(HUNG):
        assert await machine.run(Work(), METHOD=REVERSE, CPUS=2, COUNT=50) == ALL_RIGHT
    assert machine.outcomes == {"handled": 100}


@pytest.mark.no_cover
# It takes long, and what differs between the loops is tested with less.
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_many_thousand_traps_of_two_vcpus(machine, count):
    work = Work()
    with anyio.fail_after(HUNG):
        assert await machine.run(work, CPUS=2, COUNT=count) == ALL_RIGHT
    assert work.calls == {0: count, 1: count}


@under_tcg
@pytest.mark.parametrize(("user", "ring"), [(0, 0), (1, 3)])
async def test_the_handler_of_undefined_instructions_finds_every_hypercall(machine, user, ring):
    work = Work()
    with anyio.fail_after(HUNG):
        assert await machine.run(work, ud=True, HOW=VMCALL, USER=user, COUNT=90) == ALL_RIGHT
    assert machine.outcomes == {"handled": 90}
    assert work.where == {("vmcall", 3, 64, ring)}


@under_tcg
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("ud", [False, True], ids=["sites", "ud"])
async def test_what_is_not_ours_runs_natively(machine, cpus, ud):
    with anyio.fail_after(HUNG):
        status = await machine.run(OfAnother(), ud=ud, HOW=ALL, CPUS=cpus, COUNT=30, NATIVE=1)
    assert (status, machine.outcomes) == (ALL_RIGHT, {})


async def test_with_kvm_too_what_is_not_ours_runs_natively(machine):
    with anyio.fail_after(HUNG):
        assert await machine.run(OfAnother(), HOW=CPUID, CPUS=2, COUNT=30, NATIVE=1) == ALL_RIGHT
    assert not machine.outcomes


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_host_that_stops_leaves_a_guest_that_runs_natively(machine, cpus):
    """It makes calls without end: when it is let go, it sees that they are not answered."""
    work = Work()
    with anyio.fail_after(HUNG):
        guest = machine.guest(HOW=CPUID, CPUS=cpus, COUNT=ENDLESS)
        async with guest, machine.host(work) as server:
            await work.begun.wait()
            server.stop()
    assert machine.status == NOT_ANSWERED
    assert machine.ends == [(vcpu, "stopped") for vcpu in range(cpus)]


async def test_a_host_that_is_cancelled_in_a_trap_lets_go_of_the_guest(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, METHOD=HOLD, COUNT=ENDLESS):
            with anyio.CancelScope() as scope:
                async with machine.host(work):
                    await work.begun.wait()
                    scope.cancel()
    assert machine.status == NOT_ANSWERED


async def test_a_guest_that_runs_can_be_joined_and_left_again(machine):
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, NATIVE=1, COUNT=ENDLESS):
            await machine.command("cont")
            async with open_backend(machine.spec()):
                assert not (await machine.command("query-status"))["running"]
            assert (await machine.command("query-status"))["running"]
            async with machine.host(OfAnother()) as server:
                while not (await machine.command("query-status"))["running"]:
                    await anyio.sleep(0.01)
                server.stop()
            assert (await machine.command("query-status"))["running"]
            machine.process.kill()


async def test_breakpoints_are_armed_after_a_reset(machine):
    """The reset comes while a trap is pending, and whoever knows of it tells the backend."""
    work = Work()

    async def reset():
        await machine.command("system_reset")
        while (await machine.command("query-status"))["status"] != "prelaunch":
            await anyio.sleep(0.01)
        machine.backend.was_reset()

    work.at_hundred = reset
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=ENDLESS), machine.host(work) as server:
            await work.again.wait()
            server.stop()
    assert (machine.ends, machine.status) == ([(0, "stopped")], NOT_ANSWERED)


async def test_a_monitor_tells_of_a_reset(machine, tmp_path):
    """The same, where nobody else tells the backend."""
    work, own = Work(), tmp_path / "q2"

    async def reset():
        await machine.command("system_reset")
        while not machine.backend._stops.void:
            await anyio.sleep(0.01)

    work.at_hundred = reset
    with anyio.fail_after(HUNG):
        async with (
            machine.guest("-qmp", f"unix:{own},server=on,wait=off", HOW=CPUID, COUNT=ENDLESS),
            machine.host(work, f"&qmp={own}") as server,
        ):
            await work.again.wait()
            server.stop()
    assert (machine.ends, machine.status) == ([(0, "stopped")], NOT_ANSWERED)


async def test_without_its_monitor_a_guest_is_served_all_the_same(machine, tmp_path, caplog):
    with anyio.fail_after(HUNG):
        status = await machine.run(Work(), f"&qmp={tmp_path / 'none'}", COUNT=50)
    assert (status, machine.outcomes) == (ALL_RIGHT, {"handled": 50})
    assert "its monitor does not report resets" in caplog.text


async def test_memory_that_qemu_shares_is_read_from_its_file(machine, tmp_path, monkeypatch):
    ram = tmp_path / "ram"
    ram.touch()
    found = shared_ram_reads(monkeypatch)
    backend = f"memory-backend-file,id=ram,size=32M,mem-path={ram},share=on"
    more = ["-object", backend, "-machine", "memory-backend=ram"]
    with anyio.fail_after(HUNG):
        async with (
            machine.guest(*more, METHOD=REVERSE, COUNT=20),
            machine.host(Work(), f"&ram={ram}"),
        ):
            pass
    assert (machine.status, machine.outcomes) == (ALL_RIGHT, {"handled": 20})
    assert b"hello to guest!!" in found
    assert None not in found


async def test_a_memory_file_that_is_none_is_told(machine, tmp_path):
    async with machine.guest(COUNT=1):
        with pytest.raises(BackendError, match="none: No such file or directory"):
            await open_backend(machine.spec(f"&ram={tmp_path / 'none'}")).__aenter__()
        machine.process.kill()


async def test_a_qemu_that_is_killed_in_a_trap_is_lost(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.guest(METHOD=HOLD), machine.host(work):
            await work.begun.wait()
            machine.process.send_signal(signal.SIGKILL)
    assert machine.ends == [(0, "lost")]


@pytest.mark.parametrize("machine", ["kvm"], indirect=True)
async def test_with_kvm_a_software_breakpoint_needs_code_that_is_there(machine):
    async with machine.guest():
        with pytest.raises(BackendError, match=r"the code at 0x\w+ is not there yet"):
            async with open_backend(machine.spec("&breakpoints=software")):
                pass
        machine.process.kill()
