"""Real guests that wait for slow handlers, and some that want more than they may have.

The guests check what they are answered; see `guests/slow_job.asm` and `guests/buffer.asm`.
"""

from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.engine.policy import AddressRange, Policy, Quota, Rate

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
CPUID, VMCALL = 1, 2
FORMS = {
    "x64-cpuid": (64, CPUID),
    "x64-vmcall": (64, VMCALL),
    "x86-cpuid": (32, CPUID),
    "x86-vmcall": (32, VMCALL),
}
every_form = pytest.mark.parametrize(("width", "how"), FORMS.values(), ids=FORMS)
PASSED = 0x600D
MASK32 = 0xFFFF_FFFF

SOFT = 0.05
HELD = SOFT + 1.0
"""Seconds that no vCPU is held for, on a machine that is busy with other things."""

# The methods of `Jobs`.
JOB, FAST, COUNTED, COUNTED_IN_VALUE2, FILL, FILL_WHEN_TOLD, MEETING = 1, 2, 3, 4, 5, 6, 7


class Jobs(BridgeHandler[str]):
    """What the guests of `slow_job.asm` and `buffer.asm` expect.

    A job that takes its time is over when its guest has been told to wait at least once,
    and never before: so no test depends on how busy the machine is.
    """

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0300
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4
    timeout = 30.0
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

    @method(MEETING, soft_timeout=30.0)
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
    with anyio.fail_after(60):
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


def buffer_guest(build_guest, width=64, how=VMCALL, **defines):
    defines = {"METHOD": FILL, "PAGING": 0, "MEET": 0, "REMAP": 0} | defines
    return build_guest("buffer", WIDTH=width, HOW=how, **defines)


def end_of(summary, vcpu=0):
    """What a guest that has checked everything leaves in its registers."""
    end = summary.guest.vcpus[vcpu]
    assert (end.reason, end.detail) == ("halted", "")
    return end.registers


def answered_during(held, outcomes):
    """How many traps of other vCPUs came, and were answered, while one vCPU was held."""
    before = outcomes[: outcomes.index(held)]
    return sum(outcome.event.seq > held.event.seq for outcome in before)


def kinds(outcomes):
    return [outcome.kind for outcome in outcomes]


def count(summary):
    """How often each kind of outcome was there, without those that were not."""
    return {kind.value: times for kind, times in summary.outcomes.items() if times}


class TestAGate:
    async def test_lets_the_other_vcpu_work_while_a_job_takes_its_2_seconds(self, build_guest):
        calls = 10_000
        jobs = Jobs(seconds=2.0)
        # On a machine that is slow the job takes as long as the other vCPU needs: what is
        # to be seen is who waits for whom, not how fast they are.
        jobs.may_end = anyio.Event()
        answered = Counter()

        def end_the_job(outcome, server):
            answered[outcome.event.vcpu] += 1
            if answered[1] == calls:
                jobs.may_end.set()

        image = slow_job(build_guest, COUNT=calls)
        outcomes, summary = await serve(spec_of(image, vcpus=2), jobs, each=end_the_job)
        of_job = [outcome for outcome in outcomes if outcome.event.vcpu == 0]
        of_others = [outcome for outcome in outcomes if outcome.event.vcpu == 1]
        waits = kinds(of_job).count(OutcomeKind.WAITING)

        assert end_of(summary, 0)["rax"] == end_of(summary, 1)["rax"] == PASSED
        assert len(jobs.runs) == 1
        assert waits >= 5
        assert kinds(of_job) == [OutcomeKind.WAITING] * waits + [OutcomeKind.HANDLED]
        assert of_job[-1].output == "done"
        assert end_of(summary, 0)["rcx"] == summary.retries == waits
        assert kinds(of_others) == [OutcomeKind.HANDLED] * calls
        assert outcomes.index(of_others[-1]) < outcomes.index(of_job[-1])
        # Not only between the polls: while vCPU 0 was held for its soft deadline, too.
        assert sum(answered_during(poll, outcomes) for poll in of_job) > calls / 10
        assert max(outcome.duration for outcome in outcomes) < HELD

    @every_form
    async def test_brings_the_answer_of_the_one_run_of_its_handler(self, build_guest, width, how):
        jobs = Jobs(seconds=4 * SOFT)
        image = slow_job(build_guest, width, how)
        outcomes, summary = await serve(spec_of(image, width), jobs)
        waits = len(outcomes) - 1
        assert end_of(summary)["rax"] == PASSED
        assert waits >= 1
        assert kinds(outcomes) == [OutcomeKind.WAITING] * waits + [OutcomeKind.HANDLED]
        assert end_of(summary)["rcx"] == summary.retries == waits
        assert len(jobs.runs) == 1

    @every_form
    async def test_may_count_its_attempts_in_a_value(self, build_guest, width, how):
        in_value2 = (width, how) == (32, VMCALL)  # the last one that there is
        jobs = Jobs(seconds=4 * SOFT)
        image = slow_job(
            build_guest, width, how, COUNTER=1, METHOD=COUNTED_IN_VALUE2 if in_value2 else COUNTED
        )
        outcomes, summary = await serve(spec_of(image, width), jobs)
        attempts = [
            outcome.packet.value2 if in_value2 else outcome.packet.value4 for outcome in outcomes
        ]
        assert end_of(summary)["rax"] == PASSED
        assert kinds(outcomes)[-1] is OutcomeKind.HANDLED
        assert len(outcomes) >= 2
        assert attempts == list(range(len(outcomes)))
        assert len(jobs.runs) == 1

    async def test_that_is_answered_at_once_does_not_wait(self, build_guest):
        outcomes, summary = await serve(spec_of(slow_job(build_guest)), Jobs())
        assert (end_of(summary)["rax"], end_of(summary)["rcx"]) == (PASSED, 0)
        assert kinds(outcomes) == [OutcomeKind.HANDLED]

    async def test_can_be_answered_abort(self, build_guest):
        jobs = Jobs(seconds=2 * SOFT, answer=Gate.ABORT)
        image = slow_job(build_guest, ANSWER=int(Gate.ABORT))
        _, summary = await serve(spec_of(image), jobs)
        assert end_of(summary)["rax"] == PASSED

    @every_form
    async def test_ends_for_a_job_that_never_does(self, build_guest, width, how):
        jobs = Jobs(seconds=3600.0)
        jobs.timeout = 4 * SOFT
        outcomes, summary = await serve(spec_of(slow_job(build_guest, width, how), width), jobs)
        assert end_of(summary)["rax"] == 1  # nobody answered: there are no stamps
        waits = len(outcomes) - 1
        assert kinds(outcomes) == [OutcomeKind.WAITING] * waits + [OutcomeKind.TIMEOUT]
        assert end_of(summary)["rcx"] == waits
        assert (len(jobs.runs), jobs.cancelled) == (1, 1)

    async def test_of_each_vcpu_gets_an_answer_when_two_ask_the_very_same(self, guest_code):
        code = f"""
            %include "bridge.inc"
            %include "gate.inc"
            mov r8d, 0x12345678
            BRIDGE_GATE BRIDGE_VMCALL, 0x300, {JOB}, failed
            cmp ebx, ~0x12345678 & 0xffffffff
            jne failed
            mov eax, 0x600d
            hlt
        failed:
            mov eax, 0xbad
            hlt"""
        jobs = Jobs(seconds=3 * SOFT)
        outcomes, summary = await serve(spec_of(guest_code(code), vcpus=2), jobs)
        assert [end_of(summary, vcpu)["rax"] for vcpu in (0, 1)] == [PASSED, PASSED]
        answers = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.HANDLED]
        assert sorted(outcome.event.vcpu for outcome in answers) == [0, 1]
        assert kinds(outcomes).count(OutcomeKind.WAITING) == len(outcomes) - 2
        # They differ in nothing, so either may get what was made for the other.
        assert len(jobs.runs) == 2
        assert summary.uncollected == summary.abandoned == 0

    def test_knows_the_words_of_the_host(self):
        words = {f"BRIDGE_{gate.name}": int(gate) for gate in Gate}
        lines = (ROOT / "guest/include/gate.inc").read_text().splitlines()
        found = [line.split(" equ ") for line in lines if " equ " in line]
        assert {name.strip(): int(value, 0) for name, value in found} == words


class TestTheGuestsBuffer:
    @every_form
    @pytest.mark.parametrize("paging", [0, 1], ids=["unpaged", "paged"])
    async def test_gets_its_bytes_with_the_answer_and_not_before(
        self, build_guest, width, how, paging
    ):
        jobs = Jobs(seconds=3 * SOFT)
        image = buffer_guest(build_guest, width, how, PAGING=paging)
        outcomes, summary = await serve(spec_of(image, width), jobs)
        assert end_of(summary)["rax"] == PASSED
        assert kinds(outcomes)[0] is OutcomeKind.WAITING
        assert end_of(summary)["rcx"] == len(outcomes) - 1
        assert len(jobs.runs) == 1

    @every_form
    async def test_is_left_alone_while_the_handler_waits_to_write(self, build_guest, width, how):
        jobs = Jobs()
        image = buffer_guest(build_guest, width, how, METHOD=FILL_WHEN_TOLD, MEET=1)
        outcomes, summary = await serve(spec_of(image, width, vcpus=2), jobs)
        assert end_of(summary, 0)["rax"] == end_of(summary, 1)["rax"] == PASSED
        # vCPU 1 heard of the write before vCPU 0 asked again; the bytes came after that.
        order = [(outcome.event.vcpu, outcome.kind) for outcome in outcomes]
        assert order[:2] == [(0, OutcomeKind.WAITING), (1, OutcomeKind.HANDLED)]
        assert order[-1] == (0, OutcomeKind.HANDLED)
        assert len(jobs.runs) == 1

    async def test_is_where_the_guest_has_mapped_it_when_it_asks_again(self, build_guest):
        image = buffer_guest(build_guest, METHOD=FILL_WHEN_TOLD, PAGING=1, MEET=1, REMAP=1)
        jobs = Jobs()
        async with open_backend(spec_of(image, vcpus=2)) as backend:
            server = BridgeServer(backend, Bridge(jobs))
            await outcomes_of(server, jobs)
            before, after = (bytes(backend._ram[at : at + (2 << 20)]) for at in (2 << 20, 8 << 20))
        assert end_of(server.summary, 0)["rax"] == PASSED
        assert not any(before)
        assert after[0xFF0:0xFF8] == bytes([3, 10, 17, 24, 31, 38, 45, 52])


# A proper call of the method FAST, which ends the guest with rax = 0x600d if it is answered.
PROPER_CALL = """
proper_call:
    mov r8d, 0x12345678
    BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
    BRIDGE_CHECK_STAMPS failed
    cmp eax, ~0x12345678 & 0xffffffff
    jne failed
    mov eax, 0x600d
    hlt
failed:
    mov eax, 0xbad
    hlt
"""


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


class TestAFlood:
    async def test_of_what_nobody_handles_is_answered_and_the_session_goes_on(
        self, guest_code, caplog
    ):
        # 3,000 times each: a request that nobody has, by VMCALL, and a method that its
        # handler has not, by CPUID. Codes and values come from a generator of any numbers.
        code = f"""
            %include "bridge.inc"
            mov r15d, 3000
            mov r14d, 1
        again:
            imul r14d, r14d, 1664525
            add r14d, 1013904223
            mov r13d, r14d
            or r13d, 0x8000             ; a request from 0x8000
            mov r8, r14
            imul r9, r14, 0x10001
            mov rbx, r9
            mov ecx, BRIDGE_MAGIC
            mov edx, r13d
            vmcall
            cmp ecx, BRIDGE_MAGIC       ; nothing was written
            jne failed
            cmp edx, r13d
            jne failed
            cmp rbx, r9
            jne failed

            or r13d, 0x80000000         ; a method from 0x8000
            mov r13w, 0x300
            mov eax, BRIDGE_MAGIC
            mov ecx, r13d
            cpuid
            cmp eax, BRIDGE_MAGIC
            jne failed
            cmp ecx, r13d
            jne failed
            cmp rbx, r9
            jne failed
            dec r15d
            jnz again
        {PROPER_CALL}"""
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs())
        assert end_of(summary)["rax"] == PASSED
        expected = [OutcomeKind.UNMATCHED, OutcomeKind.REJECTED] * 3000 + [OutcomeKind.HANDLED]
        assert kinds(outcomes) == expected
        assert count(summary) == {"unmatched": 3000, "rejected": 3000, "handled": 1}
        assert len({outcome.packet.request for outcome in outcomes}) > 1500
        assert len({outcome.packet.method for outcome in outcomes}) > 1500
        assert caplog.records == []  # a guest may not fill the log

    async def test_of_jobs_that_nobody_comes_back_for_gets_the_places_that_there_are(
        self, guest_code
    ):
        # Asks for 40 jobs, once each; then for one more, as it should. No job ends before that.
        code = f"""
            %include "bridge.inc"
            %include "gate.inc"
            mov r15d, 40
        again:
            mov r8d, r15d
            BRIDGE_CALL BRIDGE_VMCALL, 0x300, {JOB}
            BRIDGE_CHECK_STAMPS failed
            cmp eax, BRIDGE_WAIT
            jne failed
            dec r15d
            jnz again
            mov r8d, 0x12345678
            BRIDGE_GATE BRIDGE_VMCALL, 0x300, {JOB}, failed
            cmp ebx, ~0x12345678 & 0xffffffff
            jne failed
            mov eax, 0x600d
            hlt
        failed:
            mov eax, 0xbad
            hlt"""
        jobs = Jobs()
        jobs.soft_timeout = 0.01
        jobs.may_end = anyio.Event()
        told = []

        def end_the_jobs(outcome, server):
            told.append(outcome.packet.value1)
            if len(told) == 40:
                assert len(jobs.runs) == 8
                jobs.may_end.set()

        image = guest_code(code)
        outcomes, summary = await serve(spec_of(image), jobs, each=end_the_jobs, in_flight=8)
        assert end_of(summary)["rax"] == PASSED
        assert kinds(outcomes)[:40] == [OutcomeKind.WAITING] * 40
        assert told[:40] == list(range(40, 0, -1))
        assert [value1 for _, value1 in jobs.runs] == [*range(40, 32, -1), 0x12345678]
        assert summary.uncollected == 8

    @pytest.mark.parametrize(
        ("how", "denied", "left_in_rbx"),
        [
            pytest.param(VMCALL, "skip", 0x1234, id="vmcall-skipped"),
            pytest.param(CPUID, "skip", 0x1234, id="cpuid-skipped"),
            pytest.param(VMCALL, BridgeResponse(value2=0xDE1ED), 0xDE1ED, id="vmcall-told"),
            pytest.param(CPUID, BridgeResponse(value2=0xDE1ED), 0xDE1ED, id="cpuid-told"),
        ],
    )
    async def test_gets_as_much_as_the_quota_has(self, guest_code, how, denied, left_in_rbx):
        # 1,000 proper calls. Ends with the number of those that were answered in rax, and
        # of those that left `left_in_rbx` and no stamps in rbx.
        code = f"""
            %include "bridge.inc"
            mov r15d, 1000
            xor r14d, r14d
            xor r13d, r13d
        again:
            mov r8d, r15d
            mov ebx, 0x1234
            BRIDGE_CALL {how}, 0x300, 2
            BRIDGE_CHECK_STAMPS none
            not eax
            cmp eax, r15d
            jne next
            inc r14d
            jmp next
        none:
            cmp ebx, {left_in_rbx}
            jne next
            inc r13d
        next:
            dec r15d
            jnz again
            mov eax, r14d
            mov ebx, r13d
            hlt"""
        policy = Policy(vm=Quota(requests=Rate(burst=100)), denied=denied)
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert kinds(outcomes) == [OutcomeKind.HANDLED] * 100 + [OutcomeKind.DENIED] * 900
        assert {outcome.error for outcome in outcomes[100:]} == {"over the request quota of the VM"}
        assert count(summary) == {"handled": 100, "denied": 900}
        assert (end_of(summary)["rax"], end_of(summary)["rbx"]) == (100, 900)

    async def test_beyond_the_quota_meets_the_cpu_itself(self, guest_code):
        code = f"""
            %include "bridge.inc"
            mov r15d, 1000
            xor r14d, r14d
        again:
            mov r8d, r15d
            BRIDGE_CALL BRIDGE_CPUID, 0x300, 2
            BRIDGE_CHECK_STAMPS native
            dec r15d
            jnz again
            jmp failed
        native:
            BRIDGE_CALL BRIDGE_CPUID, 0x300, 2
            {COMPARE_WITH_NATIVE}
            jne failed
            inc r14d
            dec r15d
            jnz native
            mov eax, r14d
            hlt
        failed:
            mov eax, 0xbad
            hlt"""
        policy = Policy(vm=Quota(requests=Rate(burst=100)))
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert count(summary) == {"handled": 100, "denied": 901}
        assert end_of(summary)["rax"] == 900
        assert {outcome.writes for outcome in outcomes[100:]} == {None}


# Descriptors for code that goes from ring 0 to ring 3.
GDT = """
align 8
gdt:
    dq 0
    dq 0x00af9b000000ffff               ; 08: 64-bit code
    dq 0x00cf93000000ffff               ; 10: data
    dq 0x00cff3000000ffff               ; 18: data, ring 3
    dq 0x00affb000000ffff               ; 20: 64-bit code, ring 3
gdt_pointer:
    dw $ - gdt - 1
    dq gdt
"""


def guest_of_two_rings(in_ring_3, after_ring_0="BRIDGE_CHECK_STAMPS failed"):
    """A VMCALL and a CPUID in ring 0, with a check after each; then code in ring 3.

    It ends by an undefined instruction, for ring 3 cannot halt. What it leaves in r15 is
    0x600d, or the ring where a check failed, plus 1: 1 or 4.
    """
    return f"""
        %include "bridge.inc"
        %include "paging.inc"
        default rel
        lgdt [gdt_pointer]
        ENABLE_PAGING_4_LEVEL
        mov r15d, 1
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
        {after_ring_0}
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_CPUID, 0x300, 2
        {after_ring_0}
        push 0x1b
        push 0x380000
        push 0x23
        lea rax, [ring3]
        push rax
        retfq
    ring3:
        mov r15d, 4
        {in_ring_3}
        mov r15d, {PASSED}
    failed:
        ud2
    {GDT}"""


def guest_of_two_address_spaces(calls):
    """Makes calls with page tables at 0x70000, then with tables at 0x7f000 that map the same.
    Ends with how many of them were answered, in rax and rbx.

    Before each other call it changes bits of CR3 that do not name the tables.
    """
    return f"""
        %include "bridge.inc"
        %include "paging.inc"
        default rel
        ENABLE_PAGING_4_LEVEL
        mov eax, [abs PAGE_TABLES]
        mov [abs 0x7f000], rax
        mov edi, PAGE_TABLES
        call make_calls
        mov r13d, r12d
        mov edi, 0x7f000
        call make_calls
        mov eax, r13d
        mov ebx, r12d
        hlt
    make_calls:
        xor r12d, r12d
        mov r15d, {calls}
    .again:
        mov cr3, rdi
        xor edi, 0x18                   ; PWT and PCD
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
        BRIDGE_CHECK_STAMPS .none
        inc r12d
    .none:
        dec r15d
        jnz .again
        ret"""


class TestAPolicy:
    @pytest.mark.parametrize(
        "denied", ["native", "skip", BridgeResponse(value2=0xDE1ED)], ids=["native", "skip", "told"]
    )
    @pytest.mark.parametrize("trap", ["cpuid", "vmcall"])
    async def test_keeps_ring_3_out_and_serves_the_kernel(self, guest_code, trap, denied):
        call = f"""
            mov r8d, 0x12345678
            mov ebx, 0x1234
            BRIDGE_CALL BRIDGE_{trap.upper()}, 0x300, 2"""
        checks = {
            ("cpuid", "native"): COMPARE_WITH_NATIVE,
            ("vmcall", "native"): "",
            ("cpuid", "skip"): "cmp eax, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0x1234",
            ("vmcall", "skip"): "cmp ecx, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0x1234",
            ("cpuid", "told"): "cmp eax, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0xde1ed",
            ("vmcall", "told"): "cmp ecx, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0xde1ed",
        }
        check = checks[trap, denied if isinstance(denied, str) else "told"]
        image = guest_code(guest_of_two_rings(f"{call}\n{check}\n jne failed"))
        policy = Policy(rings=frozenset({0}), denied=denied)
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        assert kinds(outcomes) == [OutcomeKind.HANDLED] * 2 + [OutcomeKind.DENIED]
        assert [outcome.event.ring for outcome in outcomes] == [0, 0, 3]
        assert outcomes[-1].error == "ring 3 is not allowed"
        (end,) = summary.guest.vcpus
        if (trap, denied) == ("vmcall", "native"):
            # What the instruction does without a host, and Unicorn has none.
            assert end.registers["r15"] == 4
            assert "vmcall" in end.detail
        else:
            assert end.registers["r15"] == PASSED
            assert "undefined instruction" in end.detail

    async def test_may_let_ring_3_in_and_keep_the_kernel_out(self, guest_code):
        code = guest_of_two_rings(
            """
            mov r8d, 0x12345678
            BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
            BRIDGE_CHECK_STAMPS failed""",
            after_ring_0="",
        )
        policy = Policy(rings=frozenset({3}), denied="skip")
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert kinds(outcomes) == [OutcomeKind.DENIED] * 2 + [OutcomeKind.HANDLED]
        assert summary.guest.vcpus[0].registers["r15"] == PASSED

    @pytest.mark.parametrize("how", [CPUID, VMCALL], ids=["cpuid", "vmcall"])
    async def test_names_the_code_that_may_ask_by_its_virtual_address(self, guest_code, how):
        # The same code is at 0x101000 and, by another virtual address, in ALIAS. The policy
        # has a range for each of two instructions of the latter; between them lies a third.
        code = f"""
            %include "bridge.inc"
            %include "paging.inc"
            default rel
            ENABLE_PAGING_4_LEVEL
            xor r12d, r12d              ; the calls that were answered, a bit for each
            mov r13d, 1
            call asks
            mov rax, ALIAS
            lea rcx, [asks]
            add rax, rcx
            call rax
            mov eax, r12d
            hlt
        %macro ASK 0
            mov r8d, 0x12345678
            BRIDGE_CALL {how}, 0x300, 2
            BRIDGE_CHECK_STAMPS %%none
            or r12d, r13d
        %%none:
            shl r13d, 1
        %endmacro
        times 0x101000 - 0x100000 - ($ - $$) db 0x90
        asks:
            ASK
        times 0x101100 - 0x100000 - ($ - $$) db 0x90
            ASK
        times 0x101200 - 0x100000 - ($ - $$) db 0x90
            ASK
            ret"""
        ranges = (
            AddressRange(0x4010_1000, 0x4010_10FF),
            AddressRange(0x4010_1200, 0x4010_12FF),
        )
        policy = Policy(instructions=ranges, denied="skip")
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert end_of(summary)["rax"] == 0b101_000
        assert [outcome.event.ip >> 8 for outcome in outcomes] == [
            *(0x1010, 0x1011, 0x1012),
            *(0x40_1010, 0x40_1011, 0x40_1012),
        ]
        denied = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.DENIED]
        assert count(summary) == {"handled": 2, "denied": 4}
        assert denied[0].error == f"instruction at {denied[0].event.ip:#x} is not allowed"

    async def test_names_the_address_spaces_that_may_ask_by_their_roots(self, guest_code):
        policy = Policy(address_spaces=frozenset({0x70000}), denied="skip")
        image = guest_code(guest_of_two_address_spaces(calls=2))
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        spaces = [(outcome.event.address_space, outcome.kind.value) for outcome in outcomes]
        assert spaces == [(0x70000, "handled")] * 2 + [(0x7F000, "denied")] * 2
        assert (end_of(summary)["rax"], end_of(summary)["rbx"]) == (2, 0)
        # The root is named, not what else is in CR3.
        assert [outcome.event.registers.cr3 for outcome in outcomes[:2]] == [0x70000, 0x70018]

    async def test_gives_each_address_space_a_quota_of_its_own(self, guest_code):
        policy = Policy(address_space=Quota(requests=Rate(burst=10)), denied="skip")
        image = guest_code(guest_of_two_address_spaces(calls=50))
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        one_space = [OutcomeKind.HANDLED] * 10 + [OutcomeKind.DENIED] * 40
        assert kinds(outcomes) == 2 * one_space
        assert (end_of(summary)["rax"], end_of(summary)["rbx"]) == (10, 10)


def were_let_go(summary):
    """Whether each vCPU was stopped, or came to its HLT by itself, after its last answer."""
    return {end.reason for end in summary.guest.vcpus} <= {"stopped", "halted"}


class TestAStop:
    async def test_lets_a_vcpu_go_that_polls(self, build_guest):
        jobs = Jobs(seconds=3600.0)
        jobs.timeout = 3600.0

        def stop(outcome, server):
            if server.summary.outcomes[OutcomeKind.WAITING] == 3:
                server.stop()

        outcomes, summary = await serve(spec_of(slow_job(build_guest)), jobs, each=stop, grace=SOFT)
        assert kinds(outcomes)[:3] == [OutcomeKind.WAITING] * 3
        assert were_let_go(summary)
        assert (len(jobs.runs), jobs.cancelled) == (1, 1)
        # The job is told of once: by the answer to a poll that was there, or as abandoned.
        assert summary.outcomes[OutcomeKind.CANCELLED] + summary.abandoned == 1
        assert summary.total == len(outcomes)

    async def test_lets_a_vcpu_go_that_sleeps_until_its_next_poll(self, guest_code):
        code = f"""
            %macro BRIDGE_SLEEP 0
                jmp $
            %endmacro
            %include "bridge.inc"
            %include "gate.inc"
            mov r8d, 1
            BRIDGE_GATE BRIDGE_VMCALL, 0x300, {JOB}, failed
        failed:
            hlt"""
        jobs = Jobs(seconds=3600.0)

        def stop(outcome, server):
            server.stop()

        outcomes, summary = await serve(spec_of(guest_code(code)), jobs, each=stop, grace=SOFT)
        assert kinds(outcomes) == [OutcomeKind.WAITING]
        assert [end.reason for end in summary.guest.vcpus] == ["stopped"]
        assert (jobs.cancelled, summary.abandoned, summary.uncollected) == (1, 1, 0)

    async def test_answers_a_vcpu_that_is_held(self, build_guest):
        jobs = Jobs(seconds=3600.0)
        jobs.soft_timeout = 3600.0
        jobs.timeout = 3600.0
        image = slow_job(build_guest, COUNT=1)
        async with open_backend(spec_of(image, vcpus=2)) as backend:
            server = BridgeServer(
                backend, Bridge(jobs), grace=SOFT, fallback=BridgeResponse(value4=0xBAD)
            )
            outcomes = []
            async for outcome in server.run():
                outcomes.append(outcome)
                while not jobs.runs:
                    await anyio.sleep(0.005)
                server.stop()
        assert [(outcome.event.vcpu, outcome.kind) for outcome in outcomes] == [
            (1, OutcomeKind.HANDLED),
            (0, OutcomeKind.CANCELLED),
        ]
        assert outcomes[-1].writes.rdx == 0xBAD
        assert jobs.cancelled == 1
        assert were_let_go(server.summary)

    async def test_gives_a_held_vcpu_the_answer_that_comes_in_time(self, build_guest):
        jobs = Jobs()
        jobs.soft_timeout = 3600.0
        jobs.may_end = anyio.Event()
        async with open_backend(spec_of(slow_job(build_guest))) as backend:
            server = BridgeServer(backend, Bridge(jobs), grace=30.0, stop_timeout=60.0)
            async with anyio.create_task_group() as tasks:

                async def stop_while_it_is_held():
                    while not jobs.runs:
                        await anyio.sleep(0.005)
                    server.stop()
                    jobs.may_end.set()

                tasks.start_soon(stop_while_it_is_held)
                outcomes = [outcome async for outcome in server.run()]
        assert kinds(outcomes) == [OutcomeKind.HANDLED]
        assert jobs.cancelled == 0
        assert were_let_go(server.summary)


@asynccontextmanager
async def serving(specs, bridge):
    """A server of several VMs, named by the keys, in the `async with` of their backends."""
    async with AsyncExitStack() as stack:
        backends = [
            await stack.enter_async_context(open_backend(spec, vm=vm)) for vm, spec in specs.items()
        ]
        yield BridgeServer(backends, bridge)


class TestSeveralVms:
    async def test_each_have_a_handler_of_their_own(self, build_guest):
        # Both guests send the same request at the same time; they differ in nothing.
        handlers = {"a": Jobs(seconds=2 * SOFT), "b": Jobs(seconds=4 * SOFT)}
        spec = spec_of(slow_job(build_guest, COUNT=200), vcpus=2)
        async with serving({"a": spec, "b": spec}, lambda vm: Bridge(handlers[vm])) as server:
            outcomes = await outcomes_of(server, *handlers.values())
        for vm, jobs in handlers.items():
            summary = server.summaries[vm]
            own = [outcome for outcome in outcomes if outcome.event.vm == vm]
            assert end_of(summary, 0)["rax"] == end_of(summary, 1)["rax"] == PASSED
            assert jobs.runs == [(vm, 0x70C0FFEE)]
            assert kinds(own).count(OutcomeKind.HANDLED) == 201
            assert kinds(own).count(OutcomeKind.WAITING) == end_of(summary, 0)["rcx"]
        assert server.summary.total == len(outcomes)

    async def test_may_have_one_that_is_shared(self, build_guest):
        class Shared(Jobs):
            shared = True

        jobs = Shared(seconds=2 * SOFT)
        spec = spec_of(slow_job(build_guest))
        async with serving({"a": spec, "b": spec}, lambda vm: Bridge(jobs)) as server:
            await outcomes_of(server, jobs)
        # The same request of another VM is another request.
        assert sorted(jobs.runs) == [("a", 0x70C0FFEE), ("b", 0x70C0FFEE)]
        for summary in server.summaries.values():
            assert end_of(summary)["rax"] == PASSED

    @pytest.mark.parametrize("first", ["good", "bad"])
    async def test_go_on_when_one_of_them_crashes(self, build_guest, guest_code, first):
        specs = {
            "good": spec_of(slow_job(build_guest, COUNT=500), vcpus=2),
            "bad": spec_of(guest_code("mov rax, [0x70000000]")),
        }
        jobs = {vm: Jobs() for vm in specs}
        jobs["good"].may_end = anyio.Event()
        in_order = {vm: specs[vm] for vm in sorted(specs, key=lambda vm: vm != first)}
        async with (
            serving(in_order, lambda vm: Bridge(jobs[vm])) as server,
            anyio.create_task_group() as tasks,
        ):
            run = server.run()

            async def end_the_job_after_the_crash():
                while not jobs["good"].runs or server.summaries["bad"].guest is None:
                    await anyio.sleep(0.005)
                assert server.summaries["good"].guest is None
                jobs["good"].may_end.set()

            tasks.start_soon(end_the_job_after_the_crash)
            outcomes = [outcome async for outcome in run]
        good, bad = server.summaries["good"], server.summaries["bad"]
        assert "read of 0x70000000" in bad.guest.vcpus[0].detail
        assert end_of(good, 0)["rax"] == end_of(good, 1)["rax"] == PASSED
        assert {outcome.event.vm for outcome in outcomes} == {"good"}
        assert server.summary.guest.failed
