"""Real guests that ask more than they may."""

import anyio
import pytest
from slow_jobs import (
    COMPARE_WITH_NATIVE,
    CPUID,
    JOB,
    ONE_JOB,
    PASSED,
    VMCALL,
    Jobs,
    count,
    end_of,
    kinds,
    serve,
    spec_of,
)

from vmibridge import (
    BridgeResponse,
    OutcomeKind,
)
from vmibridge.engine.access_policy import Policy, Quota, Rate

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]


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
            {ONE_JOB}"""
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
