"""The engine's deadlines, over `FakeBackend`."""

import anyio
import pytest
from engine_parts import ANSWER, HANG, MAGIC, MOVED_ON, STUBBORN, Probe, serve, server_of, trap

from vmibridge import (
    Bridge,
    BridgeHandler,
    GuestMemoryError,
    OutcomeKind,
    method,
)
from vmibridge.testing import FakeBackend

pytestmark = pytest.mark.anyio


class TestDeadlines:
    async def test_a_method_overrides_its_handler_and_that_the_server(self):
        class Timed(BridgeHandler[None]):
            MAGIC = MAGIC
            REQUEST = 1
            timeout = 0.02

            @method(1)
            async def by_handler(self, vmi, packet):
                await anyio.sleep_forever()

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
