"""A whole Linux in stock QEMU: its programs and its kernel call, and check every answer themselves.

`make linux` brings it. In CI it is brought here; elsewhere the tests are skipped without it.
"""

from collections import Counter
from itertools import product

import anyio
import pytest
from base_handlers import StandardHandler
from linux_guest import LIMIT, LinuxGuest, built_guest, exchange

from vmibridge import TrapReason
from vmibridge.engine.access_policy import Policy
from vmibridge.recording import Recorder, Replay

pytestmark = pytest.mark.anyio

INSTRUCTIONS = ("cpuid", "vmcall", "vmmcall")
CALLERS = {"user x64": (3, 64), "user x86": (3, 32), "kernel x64": (0, 64)}
"""Ring and width, as the host has to see them."""
INVERT, REVERSE, JOB = 1, 2, 3
HANDSHAKE = 5
"""Requests to the host itself before the others: its version, and the self-test."""
COUNT = 50

# Booting takes seconds, and what differs between the loops is tested with smaller guests.
ASYNCIO = ("asyncio", {"use_uvloop": False})
UVLOOP = ("asyncio", {"use_uvloop": True})
TRIO = ("trio", {})
on_asyncio = pytest.mark.parametrize("anyio_backend", [ASYNCIO], ids=["asyncio"])


@pytest.fixture(scope="module")
def folder():
    return built_guest()


@pytest.fixture
def linux(folder, qemu, plugin, tmp_path):
    return LinuxGuest(qemu, plugin, folder, tmp_path)


def results(boot):
    """What became of the calls by each caller, instruction and CPU."""
    lines = [line for line in boot.lines if line.startswith(("user ", "kernel "))]
    pairs = [line.split(": ", 1) for line in lines]
    return {place: told.partition(",")[0] for place, told in pairs}


def every_place(cpus, callers=CALLERS, instructions=INSTRUCTIONS):
    return {f"{c} {i} cpu {n}" for c, i, n in product(callers, instructions, range(cpus))}


def seen(boot):
    """Ring, width, instruction and vCPU of all traps."""
    events = [outcome.event for outcome in boot.outcomes]
    return {(event.ring, event.width, event.reason, event.vcpu) for event in events}


def kinds_by_ring(boot):
    """What became of traps, but for those that were told to wait, which is a matter of time."""
    kinds = {(outcome.event.ring, outcome.kind.value) for outcome in boot.outcomes}
    return {(ring, kind) for ring, kind in kinds if kind != "waiting"}


@pytest.mark.parametrize(
    ("anyio_backend", "cpus"),
    [
        pytest.param(ASYNCIO, 1, id="asyncio-1-vcpu"),
        pytest.param(TRIO, 2, id="trio-2-vcpus"),
        pytest.param(UVLOOP, 2, id="uvloop-2-vcpus"),
    ],
)
async def test_programs_and_the_kernel_call_by_each_instruction(linux, cpus):
    with anyio.fail_after(LIMIT):
        boot = await linux.boot("user,kernel", exchange(), cpus=cpus, count=COUNT)
    assert boot.lines[-1] == "all right", boot.lines
    assert results(boot) == dict.fromkeys(every_place(cpus), "right")
    assert (boot.status, boot.ends) == (0, [(cpu, "halted") for cpu in range(cpus)])

    # Nothing else was answered than what the guest asked for, and it came from where it says.
    calls = len(CALLERS) * len(INSTRUCTIONS) * cpus
    waits = [outcome for outcome in boot.outcomes if outcome.kind.value == "waiting"]
    assert {outcome.packet.method for outcome in waits} <= {JOB}
    handled = Counter(
        (outcome.handler, outcome.packet.method > JOB or outcome.packet.method)
        for outcome in boot.outcomes
        if outcome.kind.value == "handled"
    )
    assert handled == {
        ("host", 1): calls * HANDSHAKE,
        ("exchange", INVERT): calls * COUNT,
        ("exchange", REVERSE): calls,
        ("exchange", JOB): calls,
    }
    assert len(boot.outcomes) == len(waits) + handled.total()
    assert (boot.summary.native, boot.summary.uncollected, boot.summary.abandoned) == (0, 0, 0)
    reasons = (TrapReason.CPUID, TrapReason.VMCALL, TrapReason.VMMCALL)
    assert seen(boot) == {
        (ring, width, reason, cpu)
        for (ring, width), reason, cpu in product(CALLERS.values(), reasons, range(cpus))
    }


@on_asyncio
@pytest.mark.parametrize("now", ["asyncio", "trio"])
async def test_two_vcpus_with_slow_jobs_replay_without_a_difference(linux, tmp_path, now):
    path = tmp_path / "run.mcap"
    with anyio.fail_after(LIMIT):
        async with Recorder(path) as recorder:
            settings = {"taps": [recorder]}
            boot = await linux.boot("user,kernel", exchange(), settings, cpus=2, count=COUNT)
        assert boot.lines[-1] == "all right", boot.lines
        async with Replay(path, exchange(), loop=now) as replay:
            result = await replay.run()
    kinds = Counter(outcome.kind.value for outcome in boot.outcomes)
    assert kinds["waiting"] > 0, "the jobs were slow"
    assert (result.compared, result.different) == (kinds["handled"], 0)


class Liar(StandardHandler):
    """Answers like `exchange`, but one thing is wrong for each instruction."""

    REQUEST = 0x0200

    def __init__(self):
        self._honest = exchange()

    async def handle(self, vmi, packet):
        answer = None if packet.method == JOB else await self._honest.handle(vmi, packet)
        if vmi.event.reason is TrapReason.CPUID and packet.value1 == COUNT - 1:
            return answer.with_value1(answer.value1 ^ 1)
        if vmi.event.reason is TrapReason.VMCALL and packet.method == REVERSE:
            await vmi.memory.write(packet.value1 + 2 * packet.value2 - 1, b"\0")
        return answer


@on_asyncio
async def test_a_guest_finds_out_what_is_wrong(linux):
    with anyio.fail_after(LIMIT):
        boot = await linux.boot("user,kernel", Liar(), count=COUNT)
    assert boot.lines[-1] == "WRONG"
    wrong = {
        "cpuid": "a call has a wrong answer",
        "vmcall": "the buffer of the host is wrong",
        "vmmcall": "the job has no stamps",
    }
    assert results(boot) == {
        f"{caller} {instruction} cpu 0": f"WRONG: {wrong[instruction]}"
        for caller, instruction in product(CALLERS, INSTRUCTIONS)
    }


class WrongInTheThirdRound(StandardHandler):
    """Answers like `exchange`, but the third buffer of calls by CPUID is not taken."""

    REQUEST = 0x0200

    def __init__(self):
        self._honest = exchange()
        self._rounds = 0

    async def handle(self, vmi, packet):
        answer = await self._honest.handle(vmi, packet)
        if vmi.event.reason is TrapReason.CPUID and packet.method == REVERSE:
            self._rounds += 1
            if self._rounds == 3:
                return answer.with_value1(answer.value1 - 1)
        return answer


@on_asyncio
async def test_programs_that_have_time_call_until_an_answer_is_wrong(linux):
    with anyio.fail_after(LIMIT):
        boot = await linux.boot("few", WrongInTheThirdRound(), count=COUNT, kernel="seconds=100000")
    assert boot.lines[-1] == "WRONG"
    told = [line.split(": ", 1)[1].partition(",")[0] for line in boot.lines if " cpu 0: " in line]
    assert told == [*["right"] * 6, "WRONG: the buffer was not taken", "right", "right"]


@on_asyncio
async def test_a_policy_that_denies_programs_serves_the_kernel(linux):
    policy = Policy(rings=frozenset({0}))
    with anyio.fail_after(LIMIT):
        boot = await linux.boot("user,kernel", exchange(), {"policy": policy}, count=COUNT)
    assert boot.lines[-1] == "WRONG"
    natively = {"cpuid": "nobody", "vmcall": "signal 4", "vmmcall": "signal 4"}
    assert results(boot) == {
        f"{caller} {instruction} cpu 0": "right"
        if caller == "kernel x64"
        else natively[instruction]
        for caller, instruction in product(CALLERS, INSTRUCTIONS)
    }
    assert kinds_by_ring(boot) == {(3, "denied"), (0, "handled")}


@on_asyncio
async def test_a_policy_that_denies_the_kernel_serves_programs(linux):
    policy = Policy(rings=frozenset({3}))
    with anyio.fail_after(LIMIT):
        boot = await linux.boot("user,kernel", exchange(), {"policy": policy}, count=COUNT)
    assert boot.lines[-1] == "WRONG"
    # Without an answer to CPUID, the module tries no hypercall, and cannot be loaded.
    programs = dict.fromkeys(every_place(1, ["user x64", "user x86"]), "right")
    assert results(boot) == {**programs, "kernel x64 cpuid cpu 0": "nobody"}
    assert kinds_by_ring(boot) == {(0, "denied"), (3, "handled")}


@on_asyncio
async def test_the_guest_sees_the_same_cpuid_with_the_plugin_armed(linux):
    """Nothing is masked: two boots without the plugin are the same in every register, too.

    The number of a CPU (leaf 1 EBX, and 0xb) is the same since each is read on a CPU of its own,
    and what the kernel turns on (OSXSAVE in leaf 1, sizes in 0xd) does not depend on time. The
    model has all leaves that QEMU emulates.
    """
    with anyio.fail_after(LIMIT):
        armed = await linux.boot("leaves", exchange(), cpus=2, model="max")
        alone = await linux.boot_alone("leaves", cpus=2, model="max")
    leaves = [line for line in alone.lines if " cpuid " in line]
    for cpu, leaf in product((0, 1), ("00000000", "00000001", "40000000", "80000000", "42494d57")):
        assert any(line.startswith(f"cpu {cpu} cpuid {leaf} 00000000 ") for line in leaves), leaf
    assert [line for line in armed.lines if " cpuid " in line] == leaves
    assert (armed.lines[-1], alone.lines[-1]) == ("all right", "all right")
    # The host was there all the time, and never asked.
    assert armed.ends == [(0, "halted"), (1, "halted")]
    assert (armed.outcomes, armed.summary.native) == ([], 0)
