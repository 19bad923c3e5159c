"""A handler that holds up the event loop is reported while it does."""

import gc
import logging
import math
import sys
import threading
import time
from types import FunctionType

import anyio
import anyio.lowlevel
import pytest
from misbehaving import Misbehaves, run_guest

from vmibridge import BridgeResponse, OutcomeKind, method
from vmibridge.engine.taps import Tap

pytestmark = pytest.mark.anyio

HELD = "holds up the event loop, and with it every trap"
SOON = 0.02


class Told(logging.Handler):
    """Is set when the log says it."""

    def __init__(self):
        super().__init__()
        self.times = 0
        self.lines = []
        self.wanted = HELD
        self.is_wanted = False
        """Whether one that holds up the loop was named with what is wanted."""

    def emit(self, record):
        line = record.getMessage()
        self.lines.append(line)
        self.times += HELD in line
        self.is_wanted |= HELD in line and self.wanted in line


@pytest.fixture
def told():
    handler = Told()
    log = logging.getLogger("vmibridge.engine.loop_watch")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


class Blocks(Misbehaves):
    def __init__(self, told, *, waits=False, times=1):
        self.told, self.waits, self.times = told, waits, times
        self.slowest = math.inf
        """Seconds that two turns of the loop took at most, in the last call of method 2."""

    @method(1)
    async def block(self, vmi, packet):
        if self.waits:
            await anyio.sleep(0.001)
        self.spin()
        return BridgeResponse(value1=1)

    def spin(self):
        end = time.monotonic() + 60
        while self.told.times < self.times and time.monotonic() < end:
            time.sleep(0.001)

    @method(2)
    async def works_in_steps(self, vmi, packet):
        turns = [time.monotonic()]
        for _ in range(50):
            time.sleep(0.005)
            await anyio.lowlevel.checkpoint()
            turns.append(time.monotonic())
        self.slowest = max(later - turn for turn, later in zip(turns, turns[2:], strict=False))
        return BridgeResponse(value1=1)


class Counts(Tap):
    def __init__(self):
        self.seen = []

    def blocked(self, blocked):
        self.seen.append(blocked)


async def call_once(caller):
    return (await caller.call()).kind


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_it_names_handler_method_file_and_line_while_it_blocks(told, waits):
    tap = Counts()
    handler = Blocks(told, waits=waits)
    assert (
        await run_guest(handler, call_once, blocked_after=SOON, taps=[tap]) is OutcomeKind.HANDLED
    )
    line = next(line for line in told.lines if HELD in line)
    assert "vm fake: handler blocks" in line
    assert "method 0x0001" in line
    assert f"at {__file__}:" in line
    first = Blocks.spin.__code__.co_firstlineno
    number = int(line.split(f"{__file__}:")[1].split(",")[0])
    assert first < number <= first + 3
    # What is not urgent comes on the loop, when that turns again.
    assert len(tap.seen) == 1
    assert (tap.seen[0].handler, tap.seen[0].method) == ("blocks", 1)
    assert tap.seen[0].seconds >= SOON


class HasNoLines(Blocks):
    @method(1)
    async def block(self, vmi, packet):
        spin = self.without_lines()
        spin(self)
        return BridgeResponse(value1=1)

    def spin(self):
        end = time.monotonic() + 60
        while not self.told.is_wanted and time.monotonic() < end:
            pass

    @staticmethod
    def without_lines():
        """Python itself has a moment without a line between two of them."""
        return FunctionType(HasNoLines.spin.__code__.replace(co_linetable=b""), globals())


# Who traces a function, as coverage does, has lines of it.
@pytest.mark.no_cover
async def test_where_there_is_no_line_it_names_that_of_the_function(told):
    told.wanted = f"at {__file__}:{HasNoLines.spin.__code__.co_firstlineno},"
    await run_guest(HasNoLines(told), call_once, blocked_after=SOON)
    assert told.is_wanted


async def test_it_is_counted_in_the_summary_and_told_again_while_it_goes_on(told):
    async def scenario(caller):
        await caller.call()
        await caller.call()

    tap = Counts()
    await run_guest(Blocks(told, times=3), scenario, blocked_after=SOON, taps=[tap])
    # The second call finds the log long enough, and does not block.
    assert told.times == 3
    assert len(tap.seen) == 1


async def test_one_that_lets_the_loop_turn_is_not_reported(told):
    """It works for longer than the time after which one that blocks is reported."""
    handler = Blocks(told)

    async def scenario(caller):
        # A loop whose thread gets no processor for so long does not turn, and that is reported.
        while handler.slowest >= 0.1:
            told.times = 0
            assert (await caller.call(2)).kind is OutcomeKind.HANDLED

    await run_guest(handler, scenario, blocked_after=0.1)
    assert told.times == 0


async def test_the_thread_ends_with_the_server(told):
    def watches():
        return [each for each in threading.enumerate() if each.name == "vmibridge loop watch"]

    async def scenario(caller):
        return len(watches())

    assert await run_guest(Blocks(told), scenario) == 1
    assert await run_guest(Blocks(told), scenario, blocked_after=math.inf) == 0
    assert watches() == []


async def test_no_garbage_is_collected_while_it_looks_at_the_stack(told):
    """Before Python 3.12 the clean-up could let the loop go on in the midst of a look, and the
    process crashed."""
    began = set()

    def note(phase, info):
        if threading.current_thread().name == "vmibridge loop watch":
            began.add(sys._getframe(1).f_code.co_name)

    async def scenario(caller):
        return (await caller.call(1)).kind

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    # At each object that is made, or nearly so.
    gc.set_threshold(1, 1, 1)
    try:
        assert await run_guest(Blocks(told), scenario, blocked_after=SOON) is OutcomeKind.HANDLED
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert told.times
    assert began
    assert not began & {"_handler_in", "place_in"}
    assert gc.isenabled()
