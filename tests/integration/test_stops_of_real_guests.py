"""Servers of real guests that stop, and that have several VMs."""

from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from slow_jobs import JOB, PASSED, SOFT, Jobs, end_of, kinds, outcomes_of, serve, slow_job, spec_of

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    OutcomeKind,
    open_backend,
)

pytestmark = pytest.mark.anyio


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
            "bad": spec_of(guest_code("mov rax, [abs 0x70000000]")),
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
