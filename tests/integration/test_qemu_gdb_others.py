"""What others do to the VM by QMP while a host serves it: it is as they ask, and traps are
answered.

The handler is held in a trap for as long as the test wants it, so nothing depends on times.
"""

import random

import anyio
import pytest
from gdb_machine import machine_of
from micro_guest import ALL, CPUID, ENDLESS, INVERT, MASK64, Work
from patience import HUNG
from qcow2 import empty_disk

from vmibridge import BridgeResponse, method, open_backend
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio

PLACES = ("in a trap", "at any moment")


class Held(Work):
    """Answers, and counts; a trap may be held."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.more = anyio.Event()
        self.holds = False
        self.held, self.let_go = anyio.Event(), anyio.Event()

    @method(INVERT)
    async def invert(self, vmi, packet):
        self.count += 1
        self.more.set()
        if self.holds:
            self.holds = False
            self.held.set()
            await self.let_go.wait()
        return BridgeResponse(~packet.value1 & MASK64)

    async def further(self, count):
        """Wait for further calls."""
        until = self.count + count
        while self.count < until:
            self.more = anyio.Event()
            await self.more.wait()

    async def hold_the_next(self):
        """Wait until a trap is held."""
        self.held, self.let_go = anyio.Event(), anyio.Event()
        self.holds = True
        await self.held.wait()


@pytest.fixture(params=["system", "new"])
def machine(request, build_guest, tmp_path):
    return machine_of(request.param, request, build_guest, tmp_path)


any_accelerator = pytest.mark.parametrize("machine", ["system", "new", "kvm"], indirect=True)


@any_accelerator
async def test_a_vm_that_is_stopped_and_let_go_on_is_served(machine):
    work = Held()
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=ENDLESS), machine.host(work) as server:
            for _ in range(5):
                await work.further(10)
                await machine.command("stop")
                # A `stop` that meets the VM at a breakpoint is lost: see stop-log.
                if await machine.has_status("paused", "debug", "running") == "paused":
                    await machine.command("cont")
            await work.further(10)
            server.stop()
    assert machine.ends == [(0, "stopped")]


async def test_a_stop_in_a_trap_is_carried_out_behind_it(machine, tmp_path):
    work = Held()
    with anyio.fail_after(HUNG):
        async with (
            machine.guest(HOW=CPUID, COUNT=ENDLESS),
            machine.host(work, f"&stop-log={tmp_path / 'log'}") as server,
        ):
            for _ in range(3):
                await work.hold_the_next()
                await machine.command("stop")
                work.let_go.set()
                await machine.has_status("paused")
                await machine.command("cont")
                await work.further(10)
            server.stop()
    assert machine.ends == [(0, "stopped")]


async def test_a_vm_that_is_let_go_on_in_a_trap_stays_in_it(machine):
    work = Held()
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=ENDLESS), machine.host(work) as server:
            await work.hold_the_next()
            count = work.count
            for _ in range(3):
                await machine.command("cont")
                await machine.has_status("debug")
            assert work.count == count
            work.let_go.set()
            await work.further(10)
            server.stop()
    assert machine.ends == [(0, "stopped")]


async def test_the_answer_to_a_trap_that_a_reset_took_is_dropped(machine, caplog):
    """Nobody tells the host of it."""
    work = Held()
    with anyio.fail_after(HUNG):
        async with machine.guest(HOW=CPUID, COUNT=ENDLESS), machine.host(work) as server:
            await work.hold_the_next()
            await machine.command("system_reset")
            await machine.has_status("prelaunch")
            work.let_go.set()
            await work.further(10)
            server.stop()
    assert machine.ends == [(0, "stopped")]
    assert "vCPU 0 was taken out of a trap by another client" in caplog.text


async def test_a_vm_that_others_had_paused_before_the_host_came_stays_paused(machine, tmp_path):
    work, own = Held(), tmp_path / "q2"
    monitor = ("-qmp", f"unix:{own},server=on,wait=off")
    with anyio.fail_after(HUNG):
        async with machine.guest(*monitor, HOW=CPUID, NATIVE=1, COUNT=ENDLESS):
            await machine.command("cont")
            await machine.command("stop")
            async with open_backend(machine.spec(f"&qmp={own}")):
                pass
            assert await machine.has_status("paused", "running", "debug") == "paused"
            async with machine.host(work, f"&qmp={own}") as server:
                # The guest counts on without answers, and the host has no part in that.
                await machine.command("cont")
                await work.further(1)
                server.stop()
    assert machine.ends == [(0, "stopped")]


async def test_random_commands_of_others(machine, tmp_path):
    await random_commands(machine, tmp_path, seed=15, count=12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_many_random_commands_of_others(machine, tmp_path, seed):
    await random_commands(machine, tmp_path, seed=seed, count=60)


async def random_commands(machine, tmp_path, *, seed, count):
    """Each in a trap or somewhere; then the VM is as they ask, and goes on when they say so."""
    chosen, work, saved = random.Random(seed), Held(), False
    cpus = 1 + seed % 2
    disk = f"if=none,id=d,file={empty_disk(tmp_path / 'disk')},format=qcow2"
    with anyio.fail_after(100 + 20 * count):
        async with (
            machine.guest("-drive", disk, HOW=ALL, COUNT=ENDLESS, CPUS=cpus),
            machine.host(work, f"&stop-log={tmp_path / 'log'}") as server,
        ):
            for _ in range(count):
                await work.further(chosen.randrange(1, 20))
                verb = chosen.choice(["stop", "cont", "system_reset", "savevm", "loadvm"])
                in_a_trap = chosen.random() < 0.5
                if in_a_trap:
                    await work.hold_the_next()
                if verb in ("savevm", "loadvm"):
                    said = await machine.human(f"{verb if saved else 'savevm'} x")
                    assert not said
                    saved = True
                else:
                    await machine.command(verb)
                work.let_go.set()
                if verb == "stop":
                    await machine.has_status("paused")
                    seen = work.count
                    await machine.command("query-status")
                    assert work.count == seen
                    await machine.command("cont")
                await work.further(3)
            server.stop()
    assert machine.ends == [(vcpu, "stopped") for vcpu in range(cpus)]
    assert set(machine.outcomes) <= {"handled", "cancelled"}
    # The end of the host may find each vCPU in a trap.
    assert machine.outcomes["cancelled"] <= cpus


async def test_a_log_that_cannot_be_had_is_refused(machine, tmp_path):
    async with machine.guest():
        with pytest.raises(BackendError, match="none/log: No such file or directory"):
            await open_backend(machine.spec(f"&stop-log={tmp_path}/none/log")).__aenter__()
        machine.process.kill()
