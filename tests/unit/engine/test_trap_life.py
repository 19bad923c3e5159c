"""The life of a trap: whatever happens, and in whatever order, it is answered once.

A state machine plays all who have a part in it: the guest that traps and asks again, the
handlers, the backend and its memory, the consumer of the outcomes, and the clock. After each step
the loop runs until nothing is left to do. Then the rules are checked that hold at any time; at
the end, those that hold for a whole run.

- Time is made up (`still_time`). It stands still but for the steps that let it pass, so that a
  deadline is met to the second, and nothing here waits for a real one.
- A handler does what it is told, when it is told (`trap_life_parts`): it answers, fails, reads
  memory, or takes its time when it is cancelled.
- What the machine knows of a request, it has from what can be seen: `trap_life_rules` says what
  must follow from it.
- Each request of the engine is watched: its state changes as the table of `engine.request` says.
- Several things may happen at once. Where two of them race, either may win: the keys that this
  touches are *unsure* from there on, and only what holds for all traps is checked.
"""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import ClassVar, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from still_time import Asyncio, LoopThread, Trio
from transitions import EDGES, WatchedStates, watched_states
from trap_life_asks import (
    BOTH,
    FREE,
    LONGEST,
    OUTCOMES_AHEAD,
    PASSED,
    PATIENT,
    SERIAL,
    SOFT,
    STOP_TIMEOUT,
    STRICT,
    VCPUS,
    Ask,
    Kind,
    Manner,
    Order,
)
from trap_life_stage import End, Stage

import vmibridge.engine.workers
from vmibridge.engine.request import State

# --- the moves ----------------------------------------------------------------------


class Traps(NamedTuple):
    """A vCPU traps. It asks, asks again what was told to wait, or is none of ours."""

    vcpu: int
    what: str | Kind
    which: int

    def make(self, life: "TrapLife") -> None:
        told = life.stage.told
        if self.what == "again" and told:
            last = told[-1 - self.which % len(told)]
            life.stage.trap(last.vcpu, Kind.OURS, last.ask)
        else:
            kind = self.what if isinstance(self.what, Kind) else Kind.OURS
            life.stage.trap(self.vcpu, kind, life.asks[self.which % len(life.asks)])


class Tell(NamedTuple):
    """A handler gets an order."""

    which: int
    order: Order

    def make(self, life: "TrapLife") -> None:
        alive = life.stage.requests.alive
        if alive:
            alive[self.which % len(alive)].tell(self.order)


class SlowWrite(NamedTuple):
    """The next write to a vCPU takes its time."""

    vcpu: int

    def make(self, life: "TrapLife") -> None:
        life.stage.vm.slow_vcpus.add(self.vcpu)


class Lag(NamedTuple):
    """The consumer stops reading for some steps."""

    steps: int

    def make(self, life: "TrapLife") -> None:
        life.lag = self.steps
        life.stage.read(False)


class Done(NamedTuple):
    """Something that takes its time is done."""

    which: int

    def make(self, life: "TrapLife") -> None:
        held = life.stage.held
        if held:
            held[self.which % len(held)]()


class Time(NamedTuple):
    """Time passes."""

    seconds: float

    def make(self, life: "TrapLife") -> None:
        life.loop.advance(self.seconds)


class Ends(NamedTuple):
    """The end begins."""

    how: End

    def make(self, life: "TrapLife") -> None:
        if life.may_end:
            life.stage.end(self.how)


FIELDS = {
    "space": st.sampled_from([0x1000, 0x2000]),
    "request": st.sampled_from([FREE, FREE, SERIAL, PASSED]),
    "method": st.sampled_from([SOFT, SOFT, SOFT, PATIENT, BOTH, STRICT]),
    "what": st.integers(0, 1),
    "first": st.sampled_from([0] * len(Order) + [o.value for o in Order]),
    "detour": st.integers(0, 1),
}


def possible(ask: Ask) -> Ask:
    """The dispatcher has the terms of the server; only it makes a detour."""
    return ask._replace(**{"method": SOFT} if ask.request == PASSED else {"detour": 0})


@st.composite
def repertoires(draw) -> list[Ask]:
    """What a guest may ask: a few requests that have much in common."""
    ask = draw(st.builds(Ask, **FIELDS))
    asks = [possible(ask)]
    for field in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=3)):
        asks.append(possible(ask._replace(**{field: draw(FIELDS[field])})))
    return asks


VCPU = st.integers(0, VCPUS - 1)
WHICH = st.integers(0, 5)
WHAT = st.sampled_from(["ask"] * 6 + ["again"] * 6 + list(Kind))
ORDERS = st.sampled_from([Order.ANSWER] * len(Order) + list(Order))
SECONDS = st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0])
MOVES = st.sampled_from(
    [
        *[st.builds(Traps, VCPU, WHAT, WHICH)] * 6,
        *[st.builds(Tell, WHICH, ORDERS)] * 4,
        *[st.builds(Time, SECONDS)] * 3,
        *[st.builds(Done, WHICH)] * 3,
        st.builds(SlowWrite, VCPU),
        st.builds(Lag, st.integers(1, 6)),
        st.builds(Ends, st.sampled_from(End)),
    ]
).flatmap(lambda move: move)


# --- the machine --------------------------------------------------------------------


class TrapLife(RuleBasedStateMachine):
    """Makes the moves, one or several at a time; the loop runs in between."""

    loop: ClassVar[type[Asyncio] | type[Trio]]
    states: ClassVar[WatchedStates]
    stage: Stage

    def __init__(self):
        super().__init__()
        self.thread: LoopThread | None = None
        self.steps = self.lag = 0
        self.playing = False

    @initialize(
        seed=st.integers(0, 0xFFFF),
        asks=repertoires(),
        manners=st.lists(st.sampled_from(Manner), min_size=1, max_size=4),
        idle=st.sampled_from([1, 1024]),
        life=st.sampled_from([0, 10, 20, 30]),
        racing=st.booleans(),
        finale=st.sampled_from([end for end in End if end is not End.WRITES_FAIL]),
    )
    def begins(self, seed, asks, manners, idle, life, racing, finale):
        """`idle` is the number of idle workers that are kept, `life` that of the steps before
        anything comes to its end."""
        vmibridge.engine.workers._MAX_IDLE = idle
        self.states.wrong.clear()
        self.seed, self.asks, self.life, self.finale = seed, asks, life, finale
        self.racing = racing
        self.thread = LoopThread(self.loop)
        self.call(self._set_up, manners)
        self.thread.start(self.stage.play)
        self.playing = True
        self.step()

    async def _set_up(self, manners):
        self.tasks = len(anyio.get_running_tasks())
        self.stage = Stage(manners)

    @rule(move=MOVES)
    def something_happens(self, move):
        self.step(partial(move.make, self))

    @precondition(lambda self: self.racing)
    @rule(moves=st.lists(MOVES, min_size=2, max_size=4))
    def much_happens_at_once(self, moves):
        self.step(*[partial(move.make, self) for move in moves])

    @property
    def may_end(self) -> bool:
        return self.steps > self.life

    # Steps.

    def call(self, function, *args):
        return self.thread.start(function, *args).result(20)

    def step(self, *moves: Callable[[], object]) -> None:
        self.call(self._make, moves)

    async def _make(self, moves):
        trio._core._run._r.seed(self.seed + self.steps)
        self.steps += 1
        self.lag -= 1
        for move in moves:
            move()
        if self.lag == 0:
            self.stage.read(True)
        await self.loop.quiet()
        self.stage.check()
        assert self.states.wrong == []

    # The end of the play.

    def teardown(self):
        if self.thread is None:
            return
        try:
            if self.playing and not self.stage.requests.faults:
                self._end(self.stage)
        finally:
            if self.playing and not self.stage.done:
                with suppress(Exception):
                    self.thread.start(self._give_up).result(5)
            self.thread.close()

    def _end(self, stage):
        self.step(lambda: stage.end(self.finale))
        if stage.requests.stopped_at == math.inf:
            # The guest has ended: the deadlines of the handlers do the rest.
            self.step(lambda: stage.read(True))
            for _ in range(100):
                if not stage.unanswered():
                    break
                self.step(stage.finish_writes)
                self.step(lambda: self.loop.advance(2.0))
        else:
            if stage.how is End.BREAK and not stage.out_of_the_loop:
                self.step(lambda: stage.end(End.CANCEL))
            for _ in range(int(STOP_TIMEOUT) + 1):
                self.step(lambda: self.loop.advance(1.0))
        assert stage.unanswered() == []
        self.step(stage.leave.set)
        for _ in range(50):
            if stage.done:
                break
            self.step(stage.release)
            self.step(lambda: self.loop.advance(LONGEST))
        assert stage.done, "the server does not end"
        self.call(self._check_whole)

    async def _check_whole(self):
        self.stage.check_whole()
        assert len(anyio.get_running_tasks()) == self.tasks

    async def _give_up(self):
        self.stage.leave.set()
        self.stage.block.cancel()
        for _ in range(20):
            self.stage.release()
            self.loop.advance(4.0)
            await self.loop.quiet()


class TrapLifeOnAsyncio(TrapLife):
    loop = Asyncio


class TrapLifeOnTrio(TrapLife):
    loop = Trio


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """The engine's clock is the loop's, and trio's order of tasks can be had again."""
    monkeypatch.setattr("vmibridge.engine.workers.loop_clock", lambda: anyio.current_time)
    monkeypatch.setattr("vmibridge.engine.workers._MAX_IDLE", 1)
    monkeypatch.setattr("vmibridge.engine.server.OUTCOMES_AHEAD", OUTCOMES_AHEAD)
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def play(machine, examples: int, steps: int) -> WatchedStates:
    with watched_states() as machine.states:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    machine.states.check()
    return machine.states


SELDOM = {
    (State.INLINE, State.ENTERING),
    (State.ENTERING, State.ANSWERED),
    (State.QUEUED, State.ANSWERED),
}
"""Transitions that the moves do not lead to; `test_request_states` has those that there are."""

MACHINES = [
    pytest.param(TrapLifeOnAsyncio, id="asyncio"),
    pytest.param(TrapLifeOnTrio, id="trio"),
]


@pytest.mark.no_cover
@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens(machine):
    play(machine, examples=100, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_trap_is_answered_once_whatever_happens_for_long(machine):
    states = play(machine, examples=1500, steps=60)
    assert EDGES - set(states.seen) <= SELDOM
