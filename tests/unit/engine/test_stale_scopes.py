"""A cancel scope that a handler leaves open, and which is cancelled when its task has other work.

On trio this is the only way to cancel a task; what `Task.cancel` does is in `test_stale_timers`.
"""

import anyio
import pytest
from anyio.lowlevel import checkpoint
from engine_parts import MAGIC, serve, trap

from vmibridge import BridgeHandler, BridgeResponse, OutcomeKind, method
from vmibridge.engine.taps import Tap
from vmibridge.testing import FakeBackend

pytestmark = pytest.mark.anyio

LEFT_OPEN = "RuntimeError: it left a cancel scope or a task group open"


class LeavesAScope(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, made):
        self._made = made
        self.left = []

    def fire(self):
        """Cancel what was left open, as its deadline would, and let it take effect."""
        for each in self.left:
            getattr(each, "cancel_scope", each).cancel()

    @method(1)
    async def leaves_one(self, vmi, packet):
        self.left.append(self._made())
        if isinstance(self.left[-1], anyio.CancelScope):
            self.left[-1].__enter__()
        else:
            await self.left[-1].__aenter__()
        return BridgeResponse(value1=1)

    @method(2)
    async def waits(self, vmi, packet):
        self.fire()
        await checkpoint()
        return BridgeResponse(value1=2)


EVENTS = [trap(1, 1), trap(2, 2), trap(3, 1), trap(4, 2)]
KINDS = [OutcomeKind.FAILED, OutcomeKind.HANDLED] * 2


@pytest.fixture(params=[anyio.CancelScope, anyio.create_task_group], ids=["scope", "task group"])
def handler(request):
    return LeavesAScope(request.param)


def check(outcomes):
    assert [outcome.kind for outcome in outcomes] == KINDS
    assert {outcome.error for outcome in outcomes} == {None, LEFT_OPEN}


async def fire(handler):
    handler.fire()
    for _ in range(3):
        await checkpoint()


async def test_it_cuts_off_no_answer(handler):
    class Slow(FakeBackend):
        async def resume(self, event, writes):
            await super().resume(event, writes)
            await fire(handler)

    outcomes, _, _ = await serve(EVENTS, handler, backend=Slow(EVENTS))
    check(outcomes)


async def test_nor_what_a_consumer_does_before_the_guest_goes_on(handler, caplog):
    async def before_resume(outcome):
        await fire(handler)

    outcomes, _, _ = await serve(EVENTS, handler, before_resume=before_resume)
    check(outcomes)
    assert "before_resume" not in caplog.text


async def test_nor_an_outcome_that_waits_for_room(handler):
    class Full(Tap):
        full = True

        async def room(self):
            await fire(handler)
            self.full = False

    outcomes, _, _ = await serve(EVENTS, handler, taps=[Full()])
    check(outcomes)


async def test_nor_a_handler_of_a_later_trap(handler):
    outcomes, _, _ = await serve(EVENTS, handler)
    check(outcomes)
