"""Handlers that take their time, and how a real guest that waits for them is served."""

import anyio
from base_handlers import StandardHandler

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
    open_backend,
)

CPUID, VMCALL = 1, 2


PASSED = 0x600D
MASK32 = 0xFFFF_FFFF

SOFT = 0.05
LIMIT = 300.0
"""Seconds that nothing takes, on a machine that is busy with other work, too."""


# The methods of `Jobs`.
JOB, FAST, COUNTED, COUNTED_IN_VALUE2, FILL, FILL_WHEN_TOLD, MEETING = 1, 2, 3, 4, 5, 6, 7


ONE_JOB = f"""
    mov r8d, 0x12345678
    BRIDGE_GATE BRIDGE_VMCALL, 0x300, {JOB}, failed
    cmp ebx, ~0x12345678 & 0xffffffff
    jne failed
    mov eax, {PASSED}
    hlt
failed:
    mov eax, 0xbad
    hlt
"""
"""Code that asks for a job until it is done, and checks its result; behind `gate.inc`."""


class Jobs(StandardHandler):
    """What the guests of `slow_job.asm` and `buffer.asm` expect.

    A job that takes its time is over when its guest has been told to wait at least once,
    and never before: so no test depends on how busy the machine is.
    """

    REQUEST = 0x0300
    timeout = LIMIT
    soft_timeout = SOFT

    def __init__(self, seconds=0.0, answer=Gate.CONTINUE):
        self.seconds = seconds
        self.answer = answer
        self.runs = []
        self.cancelled = 0
        self.may_end = anyio.Event()
        self.may_end.set()
        self.told_to_wait = anyio.Event()
        self.wants_to_write = anyio.Event()

    @method(JOB)
    async def job(self, vmi, packet):
        self.runs.append((vmi.vm, packet.value1))
        try:
            await self.take_time()
            await self.may_end.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        value2 = ~packet.value1 & MASK32
        return BridgeResponse(value1=self.answer, value2=value2).with_output("done")

    @method(FAST)
    async def fast(self, vmi, packet):
        return BridgeResponse(value1=~packet.value1 & MASK32)

    @method(COUNTED, retry_values=(1, 2))
    async def counted(self, vmi, packet):
        return await self.job(vmi, packet)

    @method(COUNTED_IN_VALUE2, retry_values=(1,))
    async def counted_in_value2(self, vmi, packet):
        return await self.job(vmi, packet)

    @method(FILL)
    async def fill(self, vmi, packet):
        await self.take_time()
        return await self.write(vmi, packet)

    @method(FILL_WHEN_TOLD)
    async def fill_when_told(self, vmi, packet):
        await self.told_to_wait.wait()
        self.wants_to_write.set()
        return await self.write(vmi, packet)

    @method(MEETING, soft_timeout=LIMIT)
    async def meeting(self, vmi, packet):
        await self.wants_to_write.wait()
        return BridgeResponse()

    async def take_time(self):
        if self.seconds:
            await anyio.sleep(self.seconds)
            await self.told_to_wait.wait()

    async def write(self, vmi, packet):
        self.runs.append((vmi.vm, packet.value1))
        data = bytes((7 * n + 3) & 0xFF for n in range(packet.value2))
        await vmi.memory.write(packet.value1, data)
        return BridgeResponse(value1=self.answer)


async def outcomes_of(server, *jobs, each=lambda outcome, server: None):
    """All outcomes. Tells the jobs when a guest was told to wait, and calls `each`."""
    outcomes = []
    with anyio.fail_after(LIMIT):
        async for outcome in server.run():
            outcomes.append(outcome)
            if outcome.kind is OutcomeKind.WAITING:
                for job in jobs:
                    job.told_to_wait.set()
            each(outcome, server)
    return outcomes


async def serve(spec, jobs, *, each=lambda outcome, server: None, **options):
    """Run a guest to its end: the outcomes, and the summary."""
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(jobs), **options)
        outcomes = await outcomes_of(server, jobs, each=each)
    return outcomes, server.summary


def spec_of(image, width=64, vcpus=1):
    return f"unicorn:{image}?width={width}&vcpus={vcpus}"


def slow_job(build_guest, width=64, how=VMCALL, **defines):
    defines = {"METHOD": JOB, "ANSWER": 0, "COUNT": 0, "COUNTER": 0} | defines
    return build_guest("slow_job", WIDTH=width, HOW=how, **defines)


def end_of(summary, vcpu=0):
    """What a guest that has checked everything leaves in its registers."""
    end = summary.guest.vcpus[vcpu]
    assert (end.reason, end.detail) == ("halted", "")
    return end.registers


def kinds(outcomes):
    return [outcome.kind for outcome in outcomes]


def count(summary):
    """How often each kind of outcome was there, without those that were not."""
    return {kind.value: times for kind, times in summary.outcomes.items() if times}


# After a CPUID of ours: not equal, unless the leaf BRIDGE_MAGIC + 1, which is nobody's, gives
# the very same. The CPU itself answers both as it answers its highest leaf.
COMPARE_WITH_NATIVE = """
    mov r8d, eax
    mov r9d, ebx
    mov r10d, ecx
    mov r11d, edx
    mov eax, BRIDGE_MAGIC + 1
    mov ecx, 0x20300
    cpuid
    sub eax, r8d
    sub ebx, r9d
    sub ecx, r10d
    sub edx, r11d
    or eax, ebx
    or eax, ecx
    or eax, edx
"""
