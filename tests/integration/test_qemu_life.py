"""Guests, QEMUs and hosts come, go, stop and move: no vCPU hangs, no handler waits for ever."""

import subprocess
import sys

import anyio
import msgspec
import pytest
from children import opened
from micro_guest import (
    ALL_RIGHT,
    CPUID,
    ENDLESS,
    NOT_ANSWERED,
    REVERSE,
    SLOW,
    VMCALL,
    VMMCALL,
    Work,
)
from patience import HUNG
from served_machine import shared_ram_reads
from waiting import until

pytestmark = pytest.mark.anyio

FEW, MANY = 100, 2000
"""Calls of a guest: it has begun, and it is not at its end when QEMU has taken a command."""

HANDLERS = """
from vmibridge import BridgeHandler, BridgeResponse
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

class Invert(BridgeHandler[None]):
    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100
    VERIFY_VALUE3, VERIFY_VALUE4 = STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

    async def handle(self, vmi, packet):
        return BridgeResponse(~packet.value1 & 0xFFFF_FFFF_FFFF_FFFF)
"""


class Status(msgspec.Struct):
    status: str


class Migration(msgspec.Struct):
    status: str = "none"


@pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL], ids=["cpuid", "vmcall", "vmmcall"])
@pytest.mark.no_cover
async def test_two_vcpus_at_a_time(machine, how):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(HOW=how, COUNT=600, AP_COUNT=450) == ALL_RIGHT
    assert {(width, ring) for *_, width, ring in work.where} == {(64, 0)}
    assert work.calls == {0: 600, 1: 450}
    assert machine.ends == [(0, "halted"), (1, "halted")]


@pytest.mark.no_cover
async def test_a_slow_handler_holds_its_own_vcpu_alone(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with (
            machine.host(work),
            machine.start(COUNT=1000, AP_COUNT=1, AP_METHOD=SLOW) as qemu,
        ):
            await work.begun.wait()
            # The first vCPU makes all of its calls while the second one waits.
            await until(lambda: work.calls[0] == 1000)
            assert work.calls[1] == 0
            work.end.set()
            assert await qemu.wait() == ALL_RIGHT
    assert machine.outcomes == {"handled": 1001}


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("count", [2500, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_many_thousand_traps_of_two_vcpus(machine, count):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(HOW=CPUID, COUNT=count, AP_COUNT=count) == ALL_RIGHT
    assert machine.outcomes == {"handled": 2 * count}
    assert work.calls == {0: count, 1: count}


@pytest.mark.no_cover
@pytest.mark.parametrize("arguments", ["", ",absent=wait"])
async def test_a_reset_begins_anew_with_traps_that_are_answered(machine, arguments):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work), machine.start(arguments, COUNT=MANY) as qemu:
            await until(lambda: work.calls[0] > FEW)
            await qemu.qmp.execute("system_reset")
            assert await qemu.wait() == ALL_RIGHT
    assert machine.outcomes["handled"] > MANY + FEW
    assert machine.ends == [(0, "halted")]


async def test_a_reset_in_a_trap_comes_after_its_answer(machine):
    """QEMU waits with a reset, as with a pause, until no vCPU is in a trap."""
    work = Work()
    with anyio.fail_after(HUNG):
        async with (
            machine.host(work),
            machine.start(METHOD=SLOW, COUNT=MANY) as qemu,
            qemu.qmp.events("RESET") as events,
            anyio.create_task_group() as tasks,
        ):
            await work.begun.wait()
            # QEMU replies when it has paused its vCPUs. That takes until the answer.
            tasks.start_soon(qemu.qmp.execute, "system_reset")
            with anyio.move_on_after(0.2):
                pytest.fail(f"{await events.receive()} with a vCPU in a trap")
            work.end.set()
            await events.receive()
            assert await qemu.wait() == ALL_RIGHT
    assert MANY < machine.outcomes["handled"] < 2 * MANY


@pytest.mark.no_cover
async def test_a_paused_guest_sends_no_traps_and_goes_on(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work), machine.start(COUNT=MANY) as qemu:
            await until(lambda: work.calls[0] > FEW)
            await qemu.qmp.execute("stop")
            seen = work.calls[0]
            await anyio.sleep(0.2)
            assert work.calls[0] == seen < MANY
            await qemu.qmp.execute("cont")
            assert await qemu.wait() == ALL_RIGHT
    assert machine.outcomes == {"handled": MANY}


@pytest.mark.no_cover
async def test_a_guest_that_is_saved_to_a_file_goes_on_in_another_qemu(machine, tmp_path):
    """Each of its calls is made once, with both."""
    work, saved = Work(), f"file:{tmp_path / 'state'}"
    with anyio.fail_after(HUNG):
        async with machine.host(work), machine.start(COUNT=MANY) as first:
            await until(lambda: work.calls[0] > FEW)
            await first.qmp.execute("stop")
            before = work.calls[0]
            await first.qmp.execute("migrate", uri=saved)
            while (await migration(first)) not in ("completed", "failed"):
                await anyio.sleep(0.02)
            assert await migration(first) == "completed"
            incoming = machine.start(options=f"-incoming {saved}", COUNT=MANY)
            async with incoming as second:
                await first.quit()
                while (await second.qmp.execute("query-status", Status)).status != "running":
                    await second.qmp.execute("cont")
                assert await second.wait() == ALL_RIGHT
    assert FEW < before < MANY
    assert machine.outcomes == {"handled": MANY}
    assert machine.ends == [(0, "halted"), (1024, "halted")]


async def migration(qemu):
    return (await qemu.qmp.execute("query-migrate", Migration)).status


async def test_a_qemu_that_quits_in_a_trap_cancels_its_handler(machine):
    """It does not wait for the answer: the vCPU gives the trap up."""
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work), machine.start(METHOD=SLOW) as qemu:
            await work.begun.wait()
            await qemu.quit()
            assert qemu.process.returncode == 0
    assert not work.end.is_set()
    assert machine.outcomes == {"cancelled": 1}
    assert machine.ends == [(0, "lost")]


@pytest.mark.no_cover
async def test_a_host_that_follows_another_goes_on_where_it_stopped(machine):
    """With `absent=wait` a guest sees nothing of it."""
    first, second = Work(), Work()
    with anyio.fail_after(HUNG):
        async with machine.start(",absent=wait", COUNT=MANY) as qemu:
            async with machine.host(first) as server:
                await until(lambda: first.calls[0] > FEW)
                server.stop()
            assert machine.ends == [(0, "stopped")]
            async with machine.host(second):
                assert await qemu.wait() == ALL_RIGHT
    assert (first.calls + second.calls)[0] == MANY
    assert second.calls[0] > 0
    assert machine.outcomes == {"handled": MANY}


@pytest.fixture
def host_command(machine, tmp_path):
    (tmp_path / "handlers.py").write_text(HANDLERS)
    spec = f"qemu-plugin:unix:{machine.socket}"
    command = [sys.executable, "-m", "vmibridge", "run", "--backend", spec, "--json"]
    return [*command, "--handlers", str(tmp_path / "handlers.py")]


async def killed_after_an_answer(host_command):
    async with opened(host_command, stderr=subprocess.DEVNULL) as host:
        await host.stdout.receive(1)
        host.kill()
        await host.wait()


async def test_a_trap_is_asked_again_when_a_host_that_was_killed_comes_back(machine, host_command):
    with anyio.fail_after(HUNG):
        async with machine.start(",absent=wait", HOW=CPUID, COUNT=ENDLESS) as qemu:
            for _ in range(3):
                await killed_after_an_answer(host_command)
                assert qemu.process.returncode is None
            async with machine.host(Work()) as server:
                await until(lambda: machine.outcomes["handled"] > 100)
                assert qemu.process.returncode is None
                server.stop()
            qemu.process.kill()


async def test_a_trap_runs_natively_when_its_host_is_killed(machine, host_command):
    statuses = []
    with anyio.fail_after(HUNG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(killed_after_an_answer, host_command)
            while not machine.socket.exists():
                await anyio.sleep(0.01)
            statuses.append(await machine.run(HOW=CPUID, COUNT=ENDLESS))
    assert statuses == [NOT_ANSWERED]


async def test_memory_that_qemu_shares_is_read_from_its_file(machine, tmp_path, monkeypatch):
    ram = tmp_path / "ram"
    ram.touch()
    found = shared_ram_reads(monkeypatch)
    options = f"-object memory-backend-file,id=ram,size=32M,mem-path={ram},share=on"
    options += " -machine memory-backend=ram"
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            status = await machine.run(f",ram={ram}", options=options, METHOD=REVERSE, COUNT=50)
    assert (status, machine.outcomes) == (ALL_RIGHT, {"handled": 50})
    assert b"hello to guest!!" in found
    assert None not in found


async def test_a_memory_file_that_is_not_there_is_told(machine, tmp_path):
    with anyio.fail_after(HUNG):
        assert await machine.run(f",ram={tmp_path / 'none'}") == 1
    assert "cannot open the file of ram=" in machine.done.stderr.decode()


@pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL], ids=["cpuid", "vmcall", "vmmcall"])
async def test_a_32_bit_guest(machine, how):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(guest="micro32", HOW=how, COUNT=500) == ALL_RIGHT
    assert {(width, ring) for *_, width, ring in work.where} == {(32, 0)}


async def test_a_32_bit_qemu(machine, qemu_i386):
    work, machine.qemu = Work(), qemu_i386
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(guest="micro32", HOW=VMCALL, COUNT=500) == ALL_RIGHT
    assert {(width, ring) for *_, width, ring in work.where} == {(32, 0)}
