"""The life of a trap: a server with all who have a part in it."""

from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
from trap_life_asks import (
    FALLBACK,
    GRACE,
    IN_FLIGHT,
    QUEUE,
    RESULT,
    RESULT_TIMEOUT,
    SOFT_TIMEOUT,
    STOP_TIMEOUT,
    TIMEOUT,
    WAIT,
    Ask,
    Fate,
    Kind,
    Manner,
    Reply,
    Trap,
)
from trap_life_parts import Behind, Free, Passes, Serial, Vm, Watched
from trap_life_rules import Requests

from vmibridge import (
    BridgeResponse,
    BridgeServer,
    Outcome,
    OutcomeKind,
)
from vmibridge.engine.access_policy import Policy
from vmibridge.errors import BackendError

# --- all of it together -------------------------------------------------------------


class End(Enum):
    """How a run comes to its end."""

    STOP = "the server is stopped"
    STOP_NOW = "the server is stopped, without grace"
    BREAK = "the consumer leaves its loop at the next outcome"
    WALK_AWAY = "the consumer leaves its loop and the block"
    CLOSE = "the consumer closes the run"
    CANCEL = "the consumer's task is cancelled"
    GUEST_ENDS = "the guest ends"
    GUEST_LOST = "the backend loses the guest, and says so"
    WRITES_FAIL = "the backend loses the guest, and no reply can be written any more"


class Stage:
    """One run of a server, for the machine to play on."""

    def __init__(self, manners: list[Manner]):
        self.requests = Requests(manners)
        self.requests.now = anyio.current_time
        self.requests.accessing = lambda ask: any(
            access.trap.ask == ask for access in self.vm.accesses
        )
        self.vm = Vm(self.requests)
        bridge = Watched(*(kind(self.requests) for kind in (Free, Serial, Passes, Behind)))
        bridge.requests = self.requests
        self.server = BridgeServer(
            self.vm,
            bridge,
            timeout=TIMEOUT,
            soft_timeout=SOFT_TIMEOUT,
            wait=BridgeResponse(WAIT),
            retry_values=(1, 2, 3),
            result_timeout=RESULT_TIMEOUT,
            fallback=BridgeResponse(FALLBACK),
            queue=QUEUE,
            in_flight=IN_FLIGHT,
            in_flight_total=IN_FLIGHT,
            grace=GRACE,
            stop_timeout=STOP_TIMEOUT,
            policy=Policy(rings=frozenset({0})),
        )
        self.outcomes: list[Outcome[Any]] = []
        self.read_on = anyio.Event()
        self.read_on.set()
        self.how: End | None = None
        self.block = anyio.CancelScope()
        self.consumer = anyio.CancelScope()
        self.leave = anyio.Event()
        self.out_of_the_loop = self.read_to_the_end = self.done = False
        self.error: BaseException | None = None

    async def play(self) -> None:
        """The consumer."""
        try:
            with self.block:
                async with self.vm:
                    await self._consume()
                    if self.how is not End.WALK_AWAY:
                        await self.leave.wait()
        except (BackendError, SystemExit) as error:
            self.error = error
            self.read_to_the_end = self.how is not End.WALK_AWAY
        finally:
            self.done = True

    async def _consume(self) -> None:
        run = self.server.run()
        with self.consumer:
            async for outcome in run:
                self.outcomes.append(outcome)
                if self.how is End.BREAK:
                    break
                await self.read_on.wait()
            else:
                self.read_to_the_end = True
        self.out_of_the_loop = True
        if self.how is End.CLOSE:
            await run.aclose()

    @property
    def told(self) -> list[Trap]:
        """Traps that were told to wait."""
        return [trap for trap in self.requests.traps.values() if trap.reply is Reply.WAIT]

    @property
    def held(self) -> list[Callable[[], None]]:
        """What takes its time: call one to end it."""
        return [
            *[written.set for written in self.vm.writing.values()],
            *[partial(self.vm.finish, access) for access in self.vm.accesses],
            *[run.let_go.set for run in self.requests.alive if run.unwinding],
        ]

    # What may happen.

    def trap(self, vcpu: int, kind: Kind, ask: Ask) -> None:
        traps = self.requests.traps
        trap = traps[len(traps) + 1] = Trap(len(traps) + 1, vcpu, kind, ask)
        self.vm.trap(trap)

    def read(self, on: bool) -> None:
        self.requests.reading = on
        if on:
            self.read_on.set()
        elif self.read_on.is_set():
            self.read_on = anyio.Event()

    def end(self, how: End) -> None:
        """Begin the end."""
        if how is End.WRITES_FAIL:
            # The traps that are there are the server's all the same.
            self.vm.lost = True
            return
        self.requests.ending = True
        guest = how in (End.GUEST_ENDS, End.GUEST_LOST)
        if not guest:
            self.requests.stopped_at = min(self.requests.stopped_at, self.requests.now())
        if how in (End.STOP, End.STOP_NOW):
            self.server.stop(now=how is End.STOP_NOW)
        elif guest:
            if not self.vm.over.is_set() and how is End.GUEST_LOST:
                self.vm.failure = BackendError("lost the guest")
            self.vm.over.set()
        elif how is End.CANCEL:
            self.block.cancel()
        elif self.how is None:
            self.how = how
            if how is not End.BREAK:
                self.consumer.cancel()
            else:
                self.read(True)

    def unanswered(self) -> list[Trap]:
        """Traps that have no reply, but for those behind a write that hangs."""
        traps = self.requests.traps.values()
        held = {trap.vcpu for trap in traps if trap.reply is not None and trap.written is None}
        return [trap for trap in traps if trap.open and trap.vcpu not in held]

    def finish_writes(self) -> None:
        for written in self.vm.writing.values():
            written.set()
        self.vm.slow_vcpus.clear()

    def release(self) -> None:
        """Let everything go that is held."""
        self.vm.slow_vcpus.clear()
        for end in self.held:
            end()
        self.read(True)

    def check(self) -> None:
        """What holds whenever the loop has nothing left to do."""
        self.requests.check()
        if not (self.requests.ending or self.requests.unsure):
            summary = self.server.summary
            assert summary.uncollected == self.requests.uncollected
            assert summary.abandoned == 0

    def check_whole(self) -> None:
        """What holds for a run from its start to its end."""
        requests, summary = self.requests, self.server.summary
        put = [trap for trap in requests.traps.values() if trap.put]
        assert self.unanswered() == []
        assert [run.ask for run in requests.alive] == []
        native = [trap for trap in put if trap.kind is Kind.NATIVE and trap.reply is not None]
        told = {t.seq for t in put if t.kind is not Kind.NATIVE and t.written is not None}
        assert summary.native == len(native)
        assert summary.total == len(told)
        seen = Counter(outcome.event.seq for outcome in self.outcomes)
        assert max(seen.values(), default=1) == 1
        assert set(seen) <= told
        if self.read_to_the_end:
            assert set(seen) == told
            assert self.error is not None or not self.vm.failed
        for outcome in self.outcomes:
            self.check_outcome(outcome)
        if not requests.unsure:
            retries = [t for t in put if t.fate in (Fate.RETRY, Fate.TOO_MANY)]
            assert summary.retries == len(retries)
            dropped = requests.told - requests.collected
            assert summary.uncollected + summary.abandoned == dropped

    def check_outcome(self, outcome: Outcome[Any]) -> None:
        """An outcome tells what the guest was told."""
        trap = self.requests.traps[outcome.event.seq]
        if not trap.written:
            assert outcome.kind is OutcomeKind.FAILED
            assert outcome.writes is None
            return
        assert outcome.writes == trap.writes
        told = {
            Reply.NATIVE: {OutcomeKind.DENIED},
            Reply.MOVED_ON: {OutcomeKind.UNMATCHED, OutcomeKind.FAILED, OutcomeKind.CANCELLED},
            Reply.WAIT: {OutcomeKind.WAITING},
            Reply.RESULT: {OutcomeKind.HANDLED},
            Reply.FALLBACK: {
                OutcomeKind.REJECTED,
                OutcomeKind.FAILED,
                OutcomeKind.TIMEOUT,
                OutcomeKind.CANCELLED,
            },
        }[trap.reply]
        assert outcome.kind in told
        if outcome.kind is OutcomeKind.HANDLED:
            assert outcome.output == outcome.writes.rax - RESULT
        if trap.kind is Kind.OURS:
            assert outcome.packet.value4 == trap.seq
