"""The states of a request: the table, what is written of it, and ways that are seldom taken.

That the engine follows the table is tested by `test_trap_life` and the soak: they look at every
change of a state.
"""

import asyncio
import re
from pathlib import Path

import anyio
import pytest
from transitions import watched_states

import vmibridge.engine.request
from vmibridge import (
    Bridge,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    Outcome,
    OutcomeKind,
    Registers,
    TrapEvent,
    TrapReason,
)
from vmibridge.engine.request import (
    DONE_BY_WORKER,
    HAS_TRAP,
    HAS_WORKER,
    PENDING,
    TRANSITIONS,
    WATCHED,
    Cause,
    Request,
    State,
    Worker,
)
from vmibridge.testing import FakeBackend

ROOT = Path(__file__).parents[3]
THEORY = vmibridge.engine.request.__doc__
ENDS = {state for state in State if not TRANSITIONS[state]}


def rows(header: str) -> dict[str, list[str]]:
    """The rows of the table of the docstring that has this header, by their first cell."""
    table = THEORY.partition(header)[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells[2:]}


# --- the table --------------------------------------------------------------------------


def test_each_state_has_a_row():
    assert list(TRANSITIONS) == list(State)


def test_every_state_is_reachable():
    reached, new = set(), {State.TAKEN}
    while new:
        reached |= new
        new = {state for old in new for state in TRANSITIONS[old].values()} - reached
    assert reached == set(State)


def test_an_end_is_reachable_from_every_state():
    ending = set(ENDS)
    for _ in State:
        ending |= {old for old, follow in TRANSITIONS.items() if ending & set(follow.values())}
    assert ending == set(State)


def test_the_ends_have_no_way_out():
    assert {state.name for state in ENDS} == {
        "ANSWERED", "OVERTAKEN", "JOINED", "COLLECTED", "DROPPED", "ABANDONED",
    }  # fmt: skip
    assert not ENDS & (HAS_TRAP | HAS_WORKER | WATCHED | PENDING)


def test_each_cause_moves_something():
    assert {cause for follow in TRANSITIONS.values() for cause in follow} == set(Cause)


def test_nothing_leads_back_to_the_begin():
    assert State.TAKEN not in {new for follow in TRANSITIONS.values() for new in follow.values()}


@pytest.mark.parametrize("state", sorted(WATCHED, key=lambda state: state.name))
def test_what_is_watched_can_be_acted_on(state):
    soft = {Cause.SOFT_DEADLINE} if state in HAS_TRAP else set()
    assert set(TRANSITIONS[state]) >= {Cause.HARD_DEADLINE, Cause.CANCEL, Cause.END} | soft
    if state in HAS_TRAP:
        # The trap is taken out: it was answered.
        for cause in (Cause.SOFT_DEADLINE, Cause.HARD_DEADLINE, Cause.CANCEL):
            assert TRANSITIONS[state][cause] not in HAS_TRAP


def test_what_is_not_watched_has_no_deadline():
    for state in set(State) - WATCHED:
        assert not {Cause.SOFT_DEADLINE, Cause.HARD_DEADLINE} & set(TRANSITIONS[state])


def test_what_was_kept_for_a_retry_has_begun():
    into_pending = {
        old
        for old, follow in TRANSITIONS.items()
        for new in follow.values()
        if new in PENDING and old not in PENDING
    }
    assert into_pending == {State.RUNNING}


def test_a_transition_is_made_as_the_table_says():
    for old, follow in TRANSITIONS.items():
        for cause in Cause:
            request = Request(Worker())
            request.state = old
            if cause in follow:
                assert request.on(cause) is request.state is follow[cause]
            else:
                with pytest.raises(RuntimeError, match=f"{cause} in {old}"):
                    request.on(cause)
                assert request.state is old


def test_overtaken_is_what_its_worker_did_not_end():
    for state in State:
        request = Request(Worker())
        request.state = state
        assert request.is_overtaken == (state not in HAS_WORKER | DONE_BY_WORKER)


# --- what is written of it --------------------------------------------------------------


def test_the_theory_has_each_state_and_what_it_has():
    states = rows("| state | the request | trap | worker | deadlines |")
    assert list(states) == [state.name for state in State]
    for name, (_, trap, worker, deadlines) in states.items():
        state = State[name]
        assert bool(trap) == (state in HAS_TRAP)
        assert bool(worker) == (state in HAS_WORKER)
        soft = ["soft"] if state in WATCHED & HAS_TRAP else []
        hard = ["hard"] if state in WATCHED else []
        expiry = ["expiry"] if Cause.EXPIRE in TRANSITIONS[state] else []
        assert [each for each in deadlines.split(", ") if each] == soft + hard + expiry


def test_the_theory_has_each_cause():
    assert set(rows("| cause | who | when |")) == set(Cause.__members__)


def test_the_diagram_of_the_design_is_the_table():
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    drawn = {
        (State[old], Cause(cause), State[new])
        for old, new, causes in re.findall(r"^    (\w+) --> (\w+): (.+)$", text, re.MULTILINE)
        for cause in causes.split(", ")
    }
    table = {
        (old, cause, new) for old, follow in TRANSITIONS.items() for cause, new in follow.items()
    }
    assert drawn == table


# --- ways that are seldom taken ---------------------------------------------------------

MAGIC = 0x1234


class Passes(BridgeDispatch):
    """Passes each request on; first it may let the loop cancel the task that it runs in."""

    def __init__(self, *, cancels=False):
        self.cancels = cancels

    def contracts(self):
        return [BridgeContract(1, MAGIC)]

    async def dispatch(self, vmi, packet):
        if self.cancels and vmi.vcpu == 1:
            # Not before it waits for its turn.
            asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
        return Outcome(OutcomeKind.UNMATCHED, packet)


class InTurn(BridgeHandler[None]):
    MAGIC, REQUEST, serial, own_task = MAGIC, 1, True, False

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    async def handle(self, vmi, packet):
        if self.seconds:
            await anyio.sleep(self.seconds)
        return BridgeResponse(1)


def trap(vcpu):
    registers = Registers(rcx=MAGIC, rdx=1)
    return TrapEvent(vcpu + 1, TrapReason.VMCALL, registers, vcpu=vcpu, length=3)


async def outcomes_of(bridge, count):
    async with FakeBackend([trap(vcpu) for vcpu in range(count)]) as backend:
        return {each.event.vcpu: each.kind async for each in BridgeServer(backend, bridge).run()}


@pytest.mark.anyio
async def test_a_serial_handler_behind_a_dispatcher_that_does_not_wait():
    with watched_states() as states:
        kinds = await outcomes_of(Bridge(Passes(), InTurn()), 1)
    states.check()
    assert kinds == {0: OutcomeKind.HANDLED}
    assert states.seen[State.INLINE, State.ENTERING] == 1
    assert states.seen[State.ENTERING, State.INLINE] == 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_while_it_waits_for_its_turn_waits_on():
    with watched_states() as states:
        kinds = await outcomes_of(Bridge(Passes(cancels=True), InTurn(0.05)), 2)
    states.check()
    assert kinds == {0: OutcomeKind.HANDLED, 1: OutcomeKind.HANDLED}
    assert states.seen[State.QUEUED, State.RUNNING] == 1
