"""Real guests that wait for slow handlers: the gate, and the guest's buffer."""

from collections import Counter
from pathlib import Path

import anyio
import pytest
from slow_jobs import (
    COUNTED,
    COUNTED_IN_VALUE2,
    CPUID,
    FILL,
    FILL_WHEN_TOLD,
    ONE_JOB,
    PASSED,
    SOFT,
    VMCALL,
    Jobs,
    end_of,
    kinds,
    outcomes_of,
    serve,
    slow_job,
    spec_of,
)

from vmibridge import (
    Bridge,
    BridgeServer,
    Gate,
    OutcomeKind,
    open_backend,
)

pytestmark = pytest.mark.anyio


ROOT = Path(__file__).parents[2]


FORMS = {
    "x64-cpuid": (64, CPUID),
    "x64-vmcall": (64, VMCALL),
    "x86-cpuid": (32, CPUID),
    "x86-vmcall": (32, VMCALL),
}
every_form = pytest.mark.parametrize(("width", "how"), FORMS.values(), ids=FORMS)


def buffer_guest(build_guest, width=64, how=VMCALL, **defines):
    defines = {"METHOD": FILL, "PAGING": 0, "MEET": 0, "REMAP": 0} | defines
    return build_guest("buffer", WIDTH=width, HOW=how, **defines)


def answered_during(held, outcomes):
    """How many traps of other vCPUs came, and were answered, while one vCPU was held."""
    before = outcomes[: outcomes.index(held)]
    return sum(outcome.event.seq > held.event.seq for outcome in before)


class TestAGate:
    @pytest.mark.parametrize("calls", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
    @pytest.mark.no_cover
    async def test_lets_the_other_vcpu_work_while_a_job_takes_its_2_seconds(
        self, build_guest, calls
    ):
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
        assert max(outcome.duration for outcome in outcomes) < jobs.seconds

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
            {ONE_JOB}"""
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
