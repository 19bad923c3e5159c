"""The engine's promises, over `FakeBackend`: every trap is answered exactly once."""

import asyncio
from collections import Counter

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vmibridge import (
    Bridge,
    BridgeDispatch,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    Registers,
    RegisterWrites,
    TrapEvent,
    TrapReason,
    method,
)
from vmibridge.bridge.registers import XEN_GUEST_REQUEST, XEN_HVM_OP
from vmibridge.errors import BackendError, HandlerLifeError, ServerStateError
from vmibridge.testing import FakeBackend, FakeGuest
from vmibridge.vm.backend import GuestEnd

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
ANSWER, WAIT, HANG, RAISE, REJECT, STUBBORN, CANCEL_ITSELF, READ = range(1, 9)


class Probe(BridgeHandler[str]):
    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747

    def __init__(self):
        self.running = 0
        self.most_running = 0
        self.seen = []
        self.unwound = anyio.Event()
        self.hanging = anyio.Event()
        self.release = anyio.Event()

    @method(ANSWER)
    async def answer(self, vmi, packet):
        self.seen.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output("now")

    @method(WAIT)
    async def wait_a_while(self, vmi, packet):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await anyio.sleep(0.002)
        self.running -= 1
        self.seen.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output("later")

    @method(HANG)
    async def hang(self, vmi, packet):
        self.running += 1
        if self.running == 4:
            self.hanging.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.unwound.set()

    @method(RAISE)
    async def fail(self, vmi, packet):
        await anyio.sleep(0)
        raise LookupError("on\npurpose")

    @method(REJECT)
    async def reject(self, vmi, packet):
        return None

    @method(STUBBORN)
    async def stubborn(self, vmi, packet):
        with anyio.CancelScope(shield=True):
            await self.release.wait()
        self.seen.append("unwound")
        return BridgeResponse(value1=0xBAD)

    @method(CANCEL_ITSELF)
    async def cancel_itself(self, vmi, packet):
        # As when something that it awaits was cancelled by others.
        await anyio.sleep(0)
        raise anyio.get_cancelled_exc_class() if packet.value1 else LookupError("no")

    @method(READ)
    async def read(self, vmi, packet):
        return BridgeResponse(value1=(await vmi.memory.read(packet.value1, 1))[0])


def trap(
    seq, code, *, vcpu=0, request=1, magic=MAGIC, value1=None, reason=TrapReason.VMCALL, **more
):
    selector = request | code << 16
    value1 = seq if value1 is None else value1
    if reason is TrapReason.CPUID:
        registers = Registers(rax=magic, rcx=selector, r8=value1, **more)
    else:
        registers = Registers(rcx=magic, rdx=selector, r8=value1, **more)
    length = 2 if reason is TrapReason.CPUID else 3
    return TrapEvent(seq, reason, registers, vcpu=vcpu, ip=0x1000, length=length)


def server_of(backend, bridge, **options):
    """A server that leaves handlers no grace at a stop: here most of them never end."""
    return BridgeServer(backend, bridge, **{"grace": 0.0, **options})


async def serve(events, *targets, backend=None, **options):
    backend = backend or FakeBackend(events)
    async with backend:
        server = server_of(backend, Bridge(*(targets or [Probe()])), **options)
        outcomes = [outcome async for outcome in server.run()]
    assert sorted(backend.writes) == sorted(event.seq for event in backend.events)
    return outcomes, backend, server


async def cancel_after(event, scope):
    await event.wait()
    scope.cancel()


MOVED_ON = RegisterWrites(0x1003)


class CancelsItsTask(BridgeHandler[None]):
    """On asyncio a handler can reach the task that it is run in."""

    MAGIC = MAGIC
    REQUEST = 1

    @method(1)
    async def and_returns(self, vmi, packet):
        asyncio.current_task().cancel()
        return BridgeResponse(value1=1)

    @method(2)
    async def and_waits(self, vmi, packet):
        asyncio.current_task().cancel()
        await anyio.sleep_forever()

    @method(3, timeout=0.01)
    async def when_it_is_overtaken(self, vmi, packet):
        try:
            await anyio.sleep_forever()
        finally:
            asyncio.current_task().cancel()

    @method(5)
    async def later(self, vmi, packet):
        asyncio.get_running_loop().call_later(0.001, asyncio.current_task().cancel)
        return BridgeResponse(value1=5)

    @method(4)
    async def well_behaved(self, vmi, packet):
        await anyio.sleep(0.001)
        return BridgeResponse(value1=4)


on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


@on_asyncio
@pytest.mark.parametrize(("code", "kind"), [(1, "handled"), (2, "cancelled"), (3, "timeout")])
async def test_a_handler_that_cancels_its_task_harms_nobody_else(code, kind):
    class SlowAnswers(FakeBackend):
        async def resume(self, event, writes):
            await anyio.sleep(0)
            await super().resume(event, writes)

    codes = [code, 4, 4] * 5
    events = [trap(seq, each, vcpu=seq % 2) for seq, each in enumerate(codes)]
    outcomes, _, _ = await serve(events, CancelsItsTask(), backend=SlowAnswers(events))
    counts = Counter(outcome.kind.value for outcome in outcomes)
    assert counts == Counter([kind, "handled", "handled"] * 5)


@on_asyncio
async def test_a_worker_that_a_handler_cancels_when_it_has_nothing_to_do_goes_on():
    async def guest(vm):
        assert (await vm.call(BridgePacket(MAGIC, 1, 5))).rax == 5
        await anyio.sleep(0.02)
        assert (await vm.call(BridgePacket(MAGIC, 1, 4))).rax == 4

    async with FakeGuest(guest) as backend:
        server = server_of(backend, Bridge(CancelsItsTask()))
        outcomes = [outcome async for outcome in server.run()]
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 2
    assert server.summary.guest is not None


@on_asyncio
async def test_a_cancelled_handler_that_awaits_what_others_cancelled_ends_only_itself():
    """A `CancelledError` that no cancel scope made, from a handler that was overtaken."""
    release, ended = anyio.Event(), anyio.Event()

    class Stubborn(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1
        timeout = 0.01

        async def handle(self, vmi, packet):
            if not packet.value1:
                with anyio.CancelScope(shield=True):
                    await release.wait()
                other = asyncio.get_running_loop().create_future()
                other.cancel()
                ended.set()
                await other
            return BridgeResponse(value1=packet.value1)

    async def guest(vm):
        assert (await vm.call(BridgePacket(MAGIC, 1, 1))).rax == 0xBAD
        release.set()
        await ended.wait()
        for _ in range(10):
            await checkpoint()
        assert (await vm.call(BridgePacket(MAGIC, 1, 1, 7))).rax == 7

    async with FakeGuest(guest) as backend:
        server = server_of(backend, Bridge(Stubborn()), fallback=BridgeResponse(value1=0xBAD))
        outcomes = [outcome async for outcome in server.run()]
    assert [outcome.kind.value for outcome in outcomes] == ["timeout", "handled"]


async def test_tasks_of_a_handler_may_fail_while_it_is_cancelled():
    """Which on trio raises a group of the cancellation and of what failed."""

    class Fails(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1

        async def fail(self):
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError("on the way out")

        async def handle(self, vmi, packet):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.fail)
                tasks.start_soon(anyio.sleep_forever)
                await anyio.sleep_forever()

    outcomes, _, _ = await serve([trap(seq, 1) for seq in (1, 2, 3)], Fails(), timeout=0.01)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.TIMEOUT] * 3


async def test_an_exit_of_a_handler_that_was_cancelled_ends_its_trap_alone():
    class Exits(BridgeHandler[None]):
        MAGIC = MAGIC
        REQUEST = 1

        async def handle(self, vmi, packet):
            try:
                await anyio.sleep_forever()
            finally:
                raise SystemExit(3)

    events = [trap(1, 1), trap(2, 1, vcpu=1)]
    outcomes, _, _ = await serve(events, Exits(), timeout=0.01)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.TIMEOUT] * 2


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


class TestDeadlines:
    async def test_a_method_overrides_its_handler_and_that_the_server(self):
        class Timed(BridgeHandler[None]):
            MAGIC = MAGIC
            REQUEST = 1
            timeout = 0.02

            @method(1)
            async def by_handler(self, vmi, packet):
                await anyio.sleep(0.1)

            @method(2, timeout=3600)
            async def by_method(self, vmi, packet):
                await anyio.sleep(0.1)

        events = [trap(1, 1), trap(2, 2)]
        outcomes, _, _ = await serve(events, Timed(), timeout=3600)
        assert [o.kind for o in outcomes] == [OutcomeKind.TIMEOUT, OutcomeKind.REJECTED]
        assert outcomes[0].error == "no answer within 0.02 s"

    async def test_the_handler_is_cancelled_and_unwinds(self):
        probe = Probe()
        backend = FakeBackend([trap(1, HANG)])
        async with backend:
            async for _ in server_of(backend, probe, timeout=0.01).run():
                pass
        assert probe.unwound.is_set()

    async def test_a_handler_that_cannot_be_cancelled_does_not_hold_the_vcpu(self):
        probe = Probe()
        backend = FakeBackend([trap(1, STUBBORN), trap(2, ANSWER)])
        async with backend:
            run = server_of(backend, probe, timeout=0.01).run()
            assert (await anext(run)).kind is OutcomeKind.TIMEOUT
            assert (await anext(run)).kind is OutcomeKind.HANDLED
            assert probe.seen == [2]
            probe.release.set()
            assert [outcome async for outcome in run] == []
        assert probe.seen == [2, "unwound"]
        assert backend.writes[1] == MOVED_ON

    async def test_a_late_handler_is_cut_off_from_the_guest(self):
        told = []

        class Late(Probe):
            async def handle(self, vmi, packet):
                memory = vmi.memory
                with anyio.CancelScope(shield=True):
                    await self.release.wait()
                    try:
                        await memory.write(0x2000, b"late")
                    except GuestMemoryError as error:
                        told.append(error.reason)

        late = Late()
        backend = FakeBackend([trap(1, ANSWER)], memory={0x2000: b"calm"})
        async with backend:
            async for _ in server_of(backend, late, timeout=0.01).run():
                late.release.set()
        assert told == ["the trap is answered: the guest runs again"]
        assert backend.memory[0x2000] == b"calm"

    async def test_many_deadlines_of_different_lengths_are_each_kept(self):
        def timed(milliseconds):
            @method(milliseconds, timeout=milliseconds / 1000)
            async def hang(self, vmi, packet):
                await anyio.sleep_forever()

            return hang

        lengths = [80, 10, 40, 20, 60, 30]
        methods = {f"hang_{length}": timed(length) for length in lengths}
        Timed = type("Timed", (BridgeHandler,), {"MAGIC": MAGIC, "REQUEST": 1, **methods})
        events = [trap(seq, length, vcpu=seq) for seq, length in enumerate(lengths)]
        outcomes, _, _ = await serve(events, Timed())
        assert sorted(o.packet.method for o in outcomes) == sorted(lengths)
        for outcome in outcomes:
            assert outcome.kind is OutcomeKind.TIMEOUT
            assert outcome.duration >= outcome.packet.method / 1000

    @pytest.mark.parametrize(
        "options", [{"timeout": 0}, {"timeout": -1}, {"queue": 0}, {"stop_timeout": 0}]
    )
    async def test_a_number_that_makes_no_sense_is_refused(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            server_of(FakeBackend(), Bridge(), **options)


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


class TestTheEnd:
    EVENTS = staticmethod(lambda: [trap(seq, HANG, vcpu=seq % 4) for seq in range(1, 21)])

    async def test_leaving_the_block_answers_what_is_pending_and_queued(self):
        backend, probe = FakeBackend(self.EVENTS()), Probe()
        async with anyio.create_task_group() as tasks, backend:
            server = server_of(backend, probe)
            with anyio.CancelScope() as scope:
                tasks.start_soon(cancel_after, probe.hanging, scope)
                async for _ in server.run():
                    pytest.fail("nothing is answered yet")
        assert sorted(backend.writes) == list(range(1, 21))
        assert server.summary.outcomes[OutcomeKind.CANCELLED] == 20

    async def test_cancelling_from_outside_answers_what_is_pending(self):
        backend, probe = FakeBackend(self.EVENTS()), Probe()
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(cancel_after, probe.hanging, scope)
                async with backend:
                    async for _ in server_of(backend, probe).run():
                        pytest.fail("nothing is answered yet")
        assert sorted(backend.writes) == list(range(1, 21))

    async def test_stop_gives_the_outcomes_of_what_it_cancelled(self):
        backend, probe = FakeBackend(self.EVENTS()), Probe()
        async with backend, anyio.create_task_group() as tasks:
            server = server_of(backend, probe)

            async def stop():
                await probe.hanging.wait()
                server.stop()
                server.stop()

            tasks.start_soon(stop)
            outcomes = [outcome async for outcome in server.run()]
        assert {o.kind for o in outcomes} == {OutcomeKind.CANCELLED}
        assert sorted(o.event.seq for o in outcomes) == list(range(1, 21))
        assert {o.error for o in outcomes} == {"the server stopped"}

    async def test_leaving_the_loop_stops_the_server(self):
        backend = FakeBackend([trap(1, ANSWER), *self.EVENTS()[1:]])
        async with backend:
            server = server_of(backend, Probe())
            async for outcome in server.run():
                assert outcome.event.seq == 1
                break
            with anyio.fail_after(5):
                while len(backend.writes) < 20:
                    await anyio.sleep(0.001)

    async def test_closing_the_run_waits_for_the_end(self):
        backend = FakeBackend([trap(1, ANSWER), *self.EVENTS()[1:]])
        async with backend:
            server = server_of(backend, Probe())
            async with server.run() as run:
                assert (await anext(run)).event.seq == 1
            assert sorted(backend.writes) == list(range(1, 21))

    async def test_a_write_that_is_under_way_is_finished(self):
        class SlowWrites(FakeBackend):
            async def resume(self, event, writes):
                if event.seq == 2:
                    writing.set()
                await anyio.sleep(0.03)
                await super().resume(event, writes)

        writing = anyio.Event()
        backend = SlowWrites([trap(1, ANSWER), trap(2, ANSWER, vcpu=1)])
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(cancel_after, writing, scope)
                async with backend:
                    async for _ in server_of(backend, Probe()).run():
                        pass
        assert sorted(backend.writes) == [1, 2]
        assert backend.writes[1].rax == 2

    async def test_a_write_that_hangs_ends_with_the_stop_timeout(self):
        class HangingWrites(FakeBackend):
            async def resume(self, event, writes):
                writing.set()
                await anyio.sleep_forever()

        writing = anyio.Event()
        backend = HangingWrites([trap(1, ANSWER)])
        async with anyio.create_task_group() as tasks, backend:
            server = server_of(backend, Probe(), stop_timeout=0.05)
            with anyio.CancelScope() as scope:
                tasks.start_soon(cancel_after, writing, scope)
                async for _ in server.run():
                    pytest.fail("nothing is answered")

    async def test_a_write_that_fails_is_told_and_the_rest_goes_on(self):
        class LosesOne(FakeBackend):
            async def resume(self, event, writes):
                await super().resume(event, writes)
                if event.seq == 1:
                    raise BackendError("gone\x1b[31m")

        backend = LosesOne([trap(1, ANSWER), trap(2, ANSWER)])
        outcomes, _, _ = await serve([], Probe(), backend=backend)
        assert [o.kind for o in outcomes] == [OutcomeKind.FAILED, OutcomeKind.HANDLED]
        assert outcomes[0].error == r"not written: BackendError: gone\x1b[31m"
        assert outcomes[0].writes is None

    async def test_an_error_of_the_backend_reaches_the_consumer(self):
        class Broken(FakeBackend):
            async def run(self, traps, sink):
                await sink.put(trap(1, ANSWER))
                self._open.add(1)
                raise BackendError("lost the VM")

        outcomes = []
        with pytest.raises(BackendError, match="lost the VM"):
            async with Broken() as backend:
                async for outcome in server_of(backend, Probe()).run():
                    outcomes.append(outcome)
        assert len(outcomes) == 1

    async def test_an_error_in_entering_a_handler_reaches_the_consumer(self):
        class Broken(Probe):
            async def __aenter__(self):
                raise OSError("no such device")

        backend = FakeBackend([trap(1, ANSWER)])
        told = "handler broken did not start: OSError: no such device"
        with pytest.raises(HandlerLifeError, match=told) as error:
            async with backend:
                async for _ in server_of(backend, Broken()).run():
                    pass
        assert isinstance(error.value.__cause__, OSError)
        assert backend.writes == {}

    async def test_an_error_in_leaving_a_handler_comes_after_the_last_outcome(self):
        class Broken(Probe):
            async def __aexit__(self, *error):
                raise OSError("still busy")

        outcomes = []
        with pytest.raises(HandlerLifeError, match="handler broken did not end: OSError: still"):
            async with FakeBackend([trap(1, ANSWER)]) as backend:
                async for outcome in server_of(backend, Broken()).run():
                    outcomes.append(outcome)
        assert len(outcomes) == 1

    async def test_handlers_are_entered_before_and_left_after_once_each(self):
        steps = []

        class Managed(Probe):
            async def __aenter__(self):
                steps.append("in")
                return self

            async def __aexit__(self, *error):
                steps.append("out")

            async def handle(self, vmi, packet):
                steps.append("handle")

        managed = Managed()
        await serve([trap(1, ANSWER)], managed, Bridge(managed))
        assert steps == ["in", "handle", "out"]

    async def test_the_guest_end_is_in_the_summary(self):
        class Ends(FakeBackend):
            async def run(self, traps, sink):
                return GuestEnd()

        _, _, server = await serve([], Probe(), backend=Ends())
        assert server.summary.guest == GuestEnd()

    async def test_a_server_that_was_stopped_before_ends_before_it_begins(self):
        async with FakeBackend([trap(1, ANSWER)]) as backend:
            server = server_of(backend, Probe())
            server.stop()
            assert [outcome async for outcome in server.run()] == []
        assert backend.writes == {}
        assert server.summary.guest is None

    async def test_a_server_runs_once_and_inside_its_backend(self):
        backend = FakeBackend()
        server = server_of(backend, Bridge())
        with pytest.raises(ServerStateError, match="has not run"):
            _ = server.summary
        with pytest.raises(ServerStateError, match="not open"):
            server.run()
        async with backend:
            assert [o async for o in server.run()] == []
            with pytest.raises(ServerStateError, match="runs once"):
                server.run()


class TestUntil:
    EVENTS = staticmethod(
        lambda: [trap(1, REJECT), trap(2, ANSWER), trap(3, WAIT), trap(4, HANG, vcpu=1)]
    )

    async def run_until(self, until, events=None):
        backend = FakeBackend(events or self.EVENTS())
        async with backend:
            server = server_of(backend, Probe())
            outcomes = [outcome async for outcome in server.run(until=until)]
            # It has stopped by now, not only with the block.
            assert sorted(backend.writes) == [1, 2, 3, 4]
            assert server.summary.total == 4
        return [outcome.event.seq for outcome in outcomes], server

    async def test_the_first_output_is_the_last_outcome(self):
        seqs, server = await self.run_until("output")
        assert seqs == [1, 2]
        assert server.summary.outcomes[OutcomeKind.CANCELLED] >= 1

    async def test_a_predicate_decides(self):
        seqs, _ = await self.run_until(lambda outcome: outcome.output == "later")
        assert seqs == [1, 2, 3]

    async def test_without_one_it_ends_with_the_guest(self):
        events = [trap(seq, ANSWER) for seq in range(1, 5)]
        assert (await self.run_until(None, events))[0] == [1, 2, 3, 4]

    async def test_one_that_is_never_true_ends_with_the_guest(self):
        events = [trap(seq, ANSWER) for seq in range(1, 5)]
        assert (await self.run_until(lambda outcome: False, events))[0] == [1, 2, 3, 4]

    async def test_one_that_raises_is_the_consumers_to_handle(self):
        backend = FakeBackend([trap(1, ANSWER), trap(2, HANG, vcpu=1)])
        with pytest.raises(ZeroDivisionError):
            async with backend:
                async for _ in server_of(backend, Probe()).run(until=lambda _: 1 / 0):
                    pass
        assert sorted(backend.writes) == [1, 2]

    async def test_an_error_on_the_way_out_is_told(self):
        class Broken(Probe):
            async def __aexit__(self, *error):
                raise OSError("still busy")

        outcomes = []
        with pytest.raises(HandlerLifeError, match="still busy"):
            async with FakeBackend([trap(1, ANSWER), trap(2, ANSWER)]) as backend:
                async for outcome in server_of(backend, Broken()).run(until="output"):
                    outcomes.append(outcome)
        assert len(outcomes) == 1


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
