"""How a run of the engine ends, and who waits for it."""

import anyio
import pytest
from engine_parts import ANSWER, HANG, REJECT, WAIT, Probe, serve, server_of, trap

from vmibridge import (
    Bridge,
    OutcomeKind,
)
from vmibridge.errors import BackendError, HandlerLifeError, ServerStateError
from vmibridge.testing import FakeBackend
from vmibridge.vm.backend import GuestEnd

pytestmark = pytest.mark.anyio


async def cancel_after(event, scope):
    await event.wait()
    scope.cancel()


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

    async def test_also_one_that_is_false(self):
        """As an exception with a length may be."""

        class EmptyError(BackendError):
            def __len__(self):
                return 0

        class Broken(FakeBackend):
            async def run(self, traps, sink):
                raise EmptyError("lost the VM")

        with pytest.raises(EmptyError):
            async with Broken() as backend:
                async for _ in server_of(backend, Probe()).run():
                    pass

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
