"""Sites that are wrong, a file of sites, and a host that comes before its QEMU."""

import anyio
import pytest
from gdb_machine import machine_of
from micro_guest import ALL, ALL_RIGHT, CPUID, Work
from patience import HUNG

from vmibridge import Bridge, BridgeServer, open_backend
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio


@pytest.fixture
def machine(request, build_guest, tmp_path):
    return machine_of("new", request, build_guest, tmp_path)


async def serve(machine, options):
    """Until the guest ends; how many traps there were."""
    async with open_backend(f"qemu-gdb:unix:{machine.stub}?{options}") as backend:
        server = BridgeServer(backend, Bridge(Work()), timeout=60)
        return len([outcome async for outcome in server.run()])


async def test_a_site_that_never_held_a_trap_instruction_fails_the_run(machine):
    """The guest comes there all the same: it is the instruction behind a CPUID of two bytes."""
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=30):
            right = machine.sites[0]
            why = f"site={right + 2:#x} held no CPUID, VMCALL or VMMCALL when the guest came there"
            with pytest.raises(BackendError, match=why):
                await serve(machine, f"site={right:#x}&site={right + 2:#x}")
    assert machine.status == ALL_RIGHT


async def test_a_file_of_sites_has_those_of_several_programs(machine, tmp_path):
    """One of them may be something else in this program, but not all."""
    sites = tmp_path / "sites"
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=ALL, COUNT=30):
            listed = [*machine.sites, machine.sites[0] + 3]
            sites.write_text("".join(f"{each:#x}\n" for each in listed))
            assert await serve(machine, f"sites={sites}") == 30
        assert machine.status == ALL_RIGHT
        async with machine.guest(HOW=CPUID, COUNT=30):
            sites.write_text(f"{machine.sites[0] + 2:#x} cpuid micro\n")
            with pytest.raises(BackendError, match="held no CPUID"):
                await serve(machine, f"sites={sites}")


async def test_a_guest_that_comes_to_no_site_is_logged(machine, caplog):
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=1):
            assert await serve(machine, "site=0x7fff0000") == 0
    assert "the guest came to none of the sites" in caplog.text


async def test_a_host_may_come_before_its_qemu(machine):
    tried = anyio.Event()
    traps = []

    async def host():
        tried.set()
        places = "&".join(f"site={each:#x}" for each in machine.sites)
        traps.append(await serve(machine, f"{places}&within=60"))

    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=1):
            # Its sites are known from here on.
            machine.process.kill()
        machine.stub.unlink()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(host)
            await tried.wait()
            await anyio.wait_all_tasks_blocked()
            assert not machine.stub.exists()
            async with machine.guest(HOW=CPUID, COUNT=30):
                pass
    assert (machine.status, traps) == (ALL_RIGHT, [30])


async def test_without_a_time_to_wait_it_fails_at_once(machine):
    with pytest.raises(BackendError, match="No such file or directory"):
        await serve(machine, "site=0x10")
