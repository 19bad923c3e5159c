"""Life and death of a host of the device, what is recorded of its calls, and a server elsewhere."""

import json
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from children import Child, opened, run_beside
from device_machine import HOST_GONE, NO_ANSWER, DeviceMachine, mostly_asyncio
from micro_guest import ALL_RIGHT, ENDLESS, REVERSE, Work
from patience import HUNG
from remote_parts import carry, served
from waiting import until

from vmibridge import BridgeResponse, open_backend
from vmibridge.recording import Replay
from vmibridge.recording.recorder import Recorder

pytestmark = pytest.mark.anyio

HOST = Path(__file__).parents[1] / "helpers/device_host.py"


@pytest.fixture
def machine(qemu, build_guest, tmp_path):
    return DeviceMachine(qemu, build_guest, tmp_path)


@pytest.fixture
def host(machine):
    """`with host(OPTIONS) as child` is a host in a process of its own, which listens."""

    @contextmanager
    def start(options):
        spec = f"vfio-user:unix:{machine.socket}?{options}"
        with Child([sys.executable, HOST, spec]) as child:
            assert child.stdout.readline() == "listens\n"
            yield child

    return start


def line_of(child):
    return anyio.to_thread.run_sync(child.stdout.readline)


class Blocks(Work):
    """Its handler stands still, and the loop with it, until QEMU's monitor has answered."""

    def __init__(self, monitor):
        super().__init__()
        self._monitor = monitor
        self.answers = []

    async def invert(self, vmi, packet):
        if packet.value1 == 3:
            thread = threading.Thread(target=self._ask)
            thread.start()
            thread.join(30)
        return BridgeResponse(~packet.value1 & ((1 << 64) - 1))

    def _ask(self):
        with socket.socket(socket.AF_UNIX) as monitor, monitor.makefile("rw") as lines:
            monitor.settimeout(30)
            monitor.connect(str(self._monitor))
            lines.readline()
            for name in ("qmp_capabilities", "query-status"):
                lines.write(json.dumps({"execute": name}) + "\n")
                lines.flush()
                self.answers.append(json.loads(lines.readline()))


@mostly_asyncio
@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_handler_that_blocks_the_loop_does_not_hold_the_monitor(machine, tmp_path, cpus):
    work = Blocks(tmp_path / "qmp")
    work.invert = partial(Blocks.invert, work)
    option = ("-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off")
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(*option, COUNT=10, CPUS=cpus) == ALL_RIGHT
    assert work.answers[1]["return"]["status"] == "running"


async def kill_a_host(machine, host):
    with anyio.fail_after(HUNG), host("kernel=1&timeout=1s") as child:
        async with opened(machine.command(COUNT=ENDLESS, timeout=1000)) as qemu:
            assert await line_of(child) == "1\n"
            assert await line_of(child) == "100\n"
            child.kill()
            # QEMU would abort at a connection that is reset, as that of a process is that was
            # killed and has not read all that it was sent: so there is a keeper.
            assert await qemu.wait() in (HOST_GONE, NO_ANSWER)


@mostly_asyncio
async def test_a_guest_sees_that_its_host_was_killed(machine, host):
    await kill_a_host(machine, host)


@mostly_asyncio
@pytest.mark.slow
async def test_a_host_that_is_killed_again_and_again_never_hangs_a_guest(machine, host):
    for _ in range(50):
        await kill_a_host(machine, host)


@mostly_asyncio
@pytest.mark.slow
async def test_a_host_that_was_stopped_for_longer_than_the_timeout_goes_on(machine, host):
    """QEMU gives accesses up meanwhile. What comes too late would kill the device."""
    with anyio.fail_after(HUNG), host("kernel=1&timeout=300ms&hold=1ms") as child:
        command = machine.command(COUNT=2_000, PATIENT=1, timeout=300)
        async with opened(command) as qemu:
            assert await line_of(child) == "1\n"
            assert await line_of(child) == "100\n"
            for _ in range(2):
                child.send_signal(signal.SIGSTOP)
                await anyio.sleep(0.7)
                child.send_signal(signal.SIGCONT)
                await anyio.sleep(0.1)
            assert await qemu.wait() == ALL_RIGHT


async def record(machine, path):
    """Forty calls of two vCPUs."""
    async with Recorder(path) as recorder, machine.host(Work(), taps=[recorder]):
        assert await machine.run(METHOD=REVERSE, COUNT=20, CPUS=2) == ALL_RIGHT


async def replayed(path):
    """How many answers were compared, and how many were different."""
    async with Replay(path, Work()) as replay:
        result = await replay.run()
    return result.compared, result.different


@mostly_asyncio
async def test_calls_by_the_device_are_recorded_and_replayed(machine, tmp_path):
    with anyio.fail_after(HUNG):
        await record(machine, tmp_path / "run.mcap")
        assert await replayed(tmp_path / "run.mcap") == (40, 0)


@mostly_asyncio
@pytest.mark.slow
async def test_recorded_calls_by_the_device_are_exported_shown_and_imported(machine, tmp_path):
    path = tmp_path / "run.mcap"
    with anyio.fail_after(HUNG):
        await record(machine, path)
        command = [sys.executable, "-m", "vmibridge", "export", path, "--to", "jsonl"]
        lines = (await run_beside([*command, "-o", tmp_path / "run.jsonl"])).stderr
        told = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
        assert {each["trap"] for each in told if "trap" in each} == {"device"}, lines
        again = tmp_path / "again.mcap"
        for arguments in (
            ["import", tmp_path / "run.jsonl", "-o", again],
            ["inspect", again],
            ["report", again, "-o", tmp_path / "run.html"],
        ):
            done = await run_beside([sys.executable, "-m", "vmibridge", *arguments])
            assert done.returncode == 0, done.stderr
        assert b"device" in (tmp_path / "run.html").read_bytes()
        assert await replayed(again) == (40, 0)


@mostly_asyncio
async def test_a_server_elsewhere_answers_calls_by_the_device(machine, tmp_path):
    url, work = f"unix:{tmp_path / 'remote.sock'}", Work()
    backend = open_backend(f"vfio-user:unix:{machine.socket}?kernel=2")
    ends, statuses = [], []

    async def run():
        await until(machine.socket.exists)
        statuses.append(await machine.run(METHOD=REVERSE, COUNT=20, CPUS=2))

    with anyio.fail_after(HUNG):
        async with served(url, work) as server, anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            agent, end = await carry(backend, url)
            ends.append(end)
            await until(lambda: not server.vms)
    assert statuses == [ALL_RIGHT]
    assert (agent.counts.traps, agent.counts.answered) == (40, 40)
    assert [(each.vcpu, each.reason) for each in ends[0].vcpus] == [(0, "halted"), (1, "halted")]
