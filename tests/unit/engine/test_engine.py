"""The engine's promises, over `FakeBackend`: outcomes, whose traps they are, order."""

import anyio
import pytest
from engine_parts import (
    ANSWER,
    CANCEL_ITSELF,
    HANG,
    MAGIC,
    MOVED_ON,
    RAISE,
    READ,
    REJECT,
    STUBBORN,
    WAIT,
    Probe,
    serve,
    server_of,
    trap,
)

from vmibridge import (
    BridgeDispatch,
    BridgeResponse,
    Outcome,
    OutcomeKind,
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.testing import FakeBackend
from vmibridge.vm.arch.x86.forms import XEN_GUEST_REQUEST, XEN_HVM_OP

pytestmark = pytest.mark.anyio


class TestEachOutcome:
    @pytest.mark.parametrize(
        ("code", "kind", "handler"),
        [
            (ANSWER, OutcomeKind.HANDLED, "probe"),
            (WAIT, OutcomeKind.HANDLED, "probe"),
            (HANG, OutcomeKind.TIMEOUT, "probe"),
            (RAISE, OutcomeKind.FAILED, "probe"),
            (REJECT, OutcomeKind.REJECTED, "probe"),
            (0x99, OutcomeKind.REJECTED, "probe"),
            (STUBBORN, OutcomeKind.TIMEOUT, "probe"),
        ],
    )
    async def test_is_told_and_answered_once(self, code, kind, handler):
        probe = Probe()
        backend = FakeBackend([trap(1, code), trap(2, ANSWER)])
        async with backend:
            timeout = 0.03 if kind is OutcomeKind.TIMEOUT else 60
            server = server_of(backend, probe, timeout=timeout)
            outcomes = []
            async for outcome in server.run():
                outcomes.append(outcome)
                probe.release.set()
        assert [o.kind for o in outcomes] == [kind, OutcomeKind.HANDLED]
        first = outcomes[0]
        assert first.handler == handler
        assert first.event == backend.events[0]
        assert first.packet.method == code
        assert first.writes == backend.writes[1]
        if kind is OutcomeKind.HANDLED:
            assert backend.writes[1] == RegisterWrites(0x1003, 2, None, None, 0x5747)
        else:
            assert backend.writes[1] == MOVED_ON
        assert server.summary.outcomes[OutcomeKind.HANDLED] >= 1
        assert server.summary.total == 2

    async def test_unmatched_leaves_the_registers_whatever_the_fallback(self):
        fallback = BridgeResponse(value1=7)
        outcomes, backend, _ = await serve([trap(1, 1, request=9)], fallback=fallback)
        assert outcomes[0].kind is OutcomeKind.UNMATCHED
        assert backend.writes[1] == MOVED_ON

    @pytest.mark.parametrize("code", [HANG, RAISE, REJECT])
    async def test_no_answer_is_the_fallback_without_stamps(self, code):
        fallback = BridgeResponse(value1=7, value3=9)
        outcomes, backend, _ = await serve([trap(1, code)], fallback=fallback, timeout=0.02)
        assert backend.writes[1] == RegisterWrites(0x1003, 7, None, 9, None)
        assert outcomes[0].response == fallback

    async def test_an_error_is_one_printable_line(self):
        outcomes, _, _ = await serve([trap(1, RAISE)])
        assert outcomes[0].error == r"LookupError: on\npurpose"

    async def test_a_handler_that_returns_something_else_fails(self):
        class Wrong(Probe):
            async def handle(self, vmi, packet):
                return 5

        outcomes, _, _ = await serve([trap(1, ANSWER)], Wrong())
        assert outcomes[0].kind is OutcomeKind.FAILED
        assert "int, not a BridgeResponse" in outcomes[0].error

    async def test_a_response_beyond_64_bits_fails(self):
        outcomes, _, _ = await serve([trap(1, ANSWER, value1=(1 << 64) - 1)])
        assert outcomes[0].kind is OutcomeKind.FAILED
        assert "64 bits" in outcomes[0].error

    async def test_bad_guest_memory_fails_and_names_the_address(self):
        outcomes, _, _ = await serve([trap(1, READ, value1=0xDEAD000)])
        assert outcomes[0].kind is OutcomeKind.FAILED
        assert "0xdead000" in outcomes[0].error

    async def test_a_16_bit_guest_fails_and_moves_on(self):
        event = TrapEvent(
            1, TrapReason.CPUID, Registers(rax=MAGIC, rcx=0x10001), ip=0xFFFF, length=2, width=16
        )
        outcomes, backend, _ = await serve([event])
        assert outcomes[0].kind is OutcomeKind.FAILED
        assert "16-bit" in outcomes[0].error
        assert backend.writes[1] == RegisterWrites(1)

    async def test_cancelled_from_within_is_answered(self, anyio_backend):
        if anyio_backend[0] == "trio":
            # There a Cancelled cannot be made by hand; the next best is a failure.
            outcomes, _, _ = await serve([trap(1, CANCEL_ITSELF, value1=0)])
            assert outcomes[0].kind is OutcomeKind.FAILED
        else:
            outcomes, backend, _ = await serve([trap(1, CANCEL_ITSELF, value1=1), trap(2, WAIT)])
            assert [o.kind for o in outcomes] == [OutcomeKind.CANCELLED, OutcomeKind.HANDLED]
            assert backend.writes[1] == MOVED_ON

    @pytest.mark.parametrize("waits", [False, True])
    async def test_system_exit_in_a_handler_fails_its_trap_alone(self, waits):
        class Exits(Probe):
            async def handle(self, vmi, packet):
                if waits:
                    await anyio.sleep(0)
                raise SystemExit(3)

        outcomes, backend, _ = await serve([trap(1, ANSWER), trap(2, ANSWER)], Exits())
        assert [outcome.kind for outcome in outcomes] == [OutcomeKind.FAILED] * 2
        assert backend.writes[1] == MOVED_ON

    async def test_a_keyboard_interrupt_fails_its_trap_and_stops_the_run_in_good_order(self):
        class Interrupted(Probe):
            async def handle(self, vmi, packet):
                raise KeyboardInterrupt

        backend = FakeBackend([trap(1, ANSWER), trap(2, ANSWER)])
        with pytest.raises(KeyboardInterrupt):
            async with backend:
                async for _ in server_of(backend, Interrupted()).run():
                    pass
        assert sorted(backend.writes) == [1, 2]


class TestWhoseTrapItIs:
    @pytest.mark.parametrize("reason", [TrapReason.PORT_IO, TrapReason.MSR, TrapReason.BREAKPOINT])
    async def test_a_trap_that_carries_no_request_runs_natively(self, reason):
        registers = Registers(rax=MAGIC, rcx=MAGIC, rdx=1)
        outcomes, backend, _ = await serve([TrapEvent(1, reason, registers, ip=0x1000, length=1)])
        assert outcomes == []
        assert backend.writes[1] is None

    async def test_a_magic_of_others_runs_natively(self):
        events = [trap(1, 1, magic=0x40000000, reason=TrapReason.CPUID), trap(2, ANSWER)]
        outcomes, backend, server = await serve(events)
        assert [o.event.seq for o in outcomes] == [2]
        assert backend.writes[1] is None
        assert server.summary.native == 1

    async def test_a_handler_without_magic_takes_every_vmcall_but_no_cpuid(self):
        class AnyMagic(Probe):
            MAGIC = None

        events = [trap(1, ANSWER, magic=5), trap(2, ANSWER, magic=5, reason=TrapReason.CPUID)]
        outcomes, backend, _ = await serve(events, AnyMagic())
        assert [(o.event.seq, o.kind) for o in outcomes] == [(1, OutcomeKind.HANDLED)]
        assert backend.writes[2] is None

    async def test_cpuid_of_any_magic_takes_an_opt_in(self):
        class AnyCpuid(Probe):
            MAGIC = None
            ANY_CPUID = True

        outcomes, _, _ = await serve(
            [trap(1, ANSWER, magic=5, reason=TrapReason.CPUID)], AnyCpuid()
        )
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED]

    async def test_where_there_are_other_hypercalls_the_signature_decides(self):
        signature = {"rax": XEN_HVM_OP, "rdi": XEN_GUEST_REQUEST}
        backend = FakeBackend(
            [
                trap(1, ANSWER),
                trap(2, ANSWER, **signature),
                trap(3, ANSWER, reason=TrapReason.CPUID),
            ]
        )
        backend.other_hypercalls = True
        outcomes, _, _ = await serve([], Probe(), backend=backend)
        assert [o.event.seq for o in outcomes] == [2, 3]
        assert backend.writes[1] is None

    async def test_a_dispatcher_of_ones_own_is_served_under_the_deadline_too(self):
        class Forward(BridgeDispatch):
            def contracts(self):
                return [Probe().contract]

            async def dispatch(self, vmi, packet):
                if packet.method == HANG:
                    await anyio.sleep_forever()
                if packet.method == ANSWER:
                    return Outcome(OutcomeKind.HANDLED, packet, BridgeResponse(value1=1), "far")
                return Outcome(OutcomeKind.UNMATCHED, packet)

        events = [trap(1, HANG), trap(2, ANSWER), trap(3, REJECT)]
        outcomes, _, _ = await serve(events, Forward(), Probe(), timeout=0.02)
        kinds = [OutcomeKind.TIMEOUT, OutcomeKind.HANDLED, OutcomeKind.REJECTED]
        assert [o.kind for o in outcomes] == kinds
        assert [o.handler for o in outcomes] == ["Forward", "far", "probe"]


class TestOrder:
    async def test_one_vcpu_is_answered_in_order(self):
        events = [trap(seq, WAIT if seq % 3 else ANSWER) for seq in range(1, 60)]
        probe = Probe()
        outcomes, backend, _ = await serve(events, probe)
        assert [o.event.seq for o in outcomes] == list(range(1, 60))
        assert list(backend.writes) == list(range(1, 60))
        assert probe.most_running == 1

    async def test_vcpus_do_not_wait_for_each_other(self):
        probe = Probe()
        backend = FakeBackend(
            [trap(1, STUBBORN, vcpu=0), *[trap(n, WAIT, vcpu=n) for n in range(2, 12)]]
        )
        async with backend:
            run = server_of(backend, probe).run()
            others = [(await anext(run)).event.vcpu for _ in range(10)]
            probe.release.set()
            assert [o.event.vcpu async for o in run] == [0]
        assert sorted(others) == list(range(2, 12))

    async def test_a_queue_smaller_than_the_load_loses_nothing(self):
        events = [
            trap(seq, WAIT if seq % 7 == 0 else ANSWER, vcpu=seq % 5) for seq in range(1, 400)
        ]
        outcomes, _, _ = await serve(events, queue=1)
        assert sorted(o.event.seq for o in outcomes) == list(range(1, 400))
        for vcpu in range(5):
            seqs = [o.event.seq for o in outcomes if o.event.vcpu == vcpu]
            assert seqs == sorted(seqs)

    async def test_a_consumer_that_lags_holds_the_traps_and_loses_nothing(self):
        events = [trap(seq, ANSWER) for seq in range(1, 5000)]
        backend = FakeBackend(events)
        async with backend:
            run = server_of(backend, Probe()).run()
            first = await anext(run)
            await anyio.sleep(0.05)
            assert len(backend.writes) < 3000
            rest = [outcome async for outcome in run]
        assert [o.event.seq for o in [first, *rest]] == list(range(1, 5000))

    async def test_context_variables_of_one_trap_do_not_reach_the_next(self):
        from contextvars import ContextVar

        variable = ContextVar("variable", default="clean")
        seen = []

        class Sets(Probe):
            async def handle(self, vmi, packet):
                seen.append(variable.get())
                variable.set("dirty")
                await anyio.sleep(0)
                assert variable.get() == "dirty"

        outcomes, _, _ = await serve([trap(seq, ANSWER) for seq in range(1, 5)], Sets())
        assert {o.kind for o in outcomes} == {OutcomeKind.REJECTED}
        assert seen == ["clean"] * 4


class TestManyVcpus:
    async def test_a_thousand_waiting_handlers_run_at_once(self):
        class AllTogether(Probe):
            @method(WAIT)
            async def wait_a_while(self, vmi, packet):
                self.running += 1
                if self.running == 1000:
                    self.release.set()
                await self.release.wait()
                return BridgeResponse()

        events = [trap(seq, WAIT, vcpu=seq % 1000) for seq in range(1, 3001)]
        outcomes, _, _ = await serve(events, AllTogether(), queue=4096, timeout=60)
        assert {o.kind for o in outcomes} == {OutcomeKind.HANDLED}
        assert len(outcomes) == 3000
