"""The recorded order of the handlers of one VM, as its engine asks for it (`vm.conductor`)."""

from collections.abc import Awaitable

import anyio.lowlevel

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.taps import Step as StepKind
from vmibridge.recording.messages import FORMAT_WITH_STEPS, Note, Outside, Session, Step
from vmibridge.recording.replay.ahead import ends_now, is_refused
from vmibridge.recording.replay.cut_offs import HEARS, CutOffs
from vmibridge.recording.replay.journal import Journal
from vmibridge.recording.replay.open_requests import OpenRequests
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.outside import ReplayedOutside
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.conductor import ConductedEngine, Conductor, OutsideCall
from vmibridge.vm.trap import TrapEvent

__all__ = ["RecordedOrder"]


_BEGUN = Awaited.BEGUN
_AT_ENDS = (Awaited.ENDED, Awaited.RESUMED)
_MAX_GAPS = 10
_MAX_UNWINDING = 16_384
"""Traps whose handlers may unwind in the recorded order."""


class RecordedOrder(Conductor):
    """See the module. `requests`: those that are open."""

    def __init__(self, walk: Walk, requests: OpenRequests, options: ReplayOptions) -> None:
        self.seed: int | None = None
        self.engine: ConductedEngine | None = None
        """`None`: none is asked what it does, as where an agent carries the traps."""
        self.has_steps: bool = False
        """Whether the recording has the steps of handlers."""
        self.gaps: list[str] = []
        """What the file says that it lacks of this VM, as one that was edited does."""
        self._clock = self._last = 0
        self._recorded = ""
        """The name of the VM in the recording."""
        self._vm = ""
        """Its name now, where a journal is kept."""
        self._walk = walk
        self._going: ReplayedRequest | None = None
        """Whose handler is about to make a step."""
        self._requests = requests
        requests.conductor = self
        self._unwinding: dict[int, ReplayedRequest] = {}
        self.cut_offs: CutOffs = CutOffs(walk)
        """Of its handlers."""
        self.fetched: ReplayedOutside = ReplayedOutside(walk, self.find, options)
        """What handlers got from outside."""

    def begin(self, session: Session) -> None:
        """This is what was recorded of the VM."""
        self.seed, self._clock, self._recorded = session.seed, session.clock, session.vm
        self.loop = session.loop
        self.has_steps = session.format >= FORMAT_WITH_STEPS
        self.cut_offs.begin(session)

    def note_steps(self, journal: Journal, vm: str, recorded: str) -> None:
        """Note what handlers do. `vm`: the name of now."""
        walk, self._vm = self._walk, vm
        journal.join(vm, recorded, walk.place, walk.time.recorded_now, has_steps=self.has_steps)

    def stepped(self, event: TrapEvent, first: int, step: StepKind) -> None:
        """A handler has made a step, where they are noted (`Tap.handler_stepped`)."""
        request, journal = self.find(first), self._walk.journal
        if request is not None and journal is not None:
            journal.step(request, step)

    def took(self, request: ReplayedRequest, event: TrapEvent) -> None:
        """The server has taken a trap of a request."""
        if request.engine is None:
            request.given = self._walk.time.recorded_now()
        request.engine = self.engine
        if self._walk.journal is not None:
            self._walk.journal.take(request, event)

    def is_refused(self, request: ReplayedRequest, retry: int) -> bool:
        """Whether a retry was answered WAIT at once in the recording (`ahead`)."""
        return self.is_asked and is_refused(self._walk.ahead(), self._recorded, request, retry)

    def restart(self, request: ReplayedRequest, event: TrapEvent, place: int) -> None:
        """A request was answered WAIT before its handler had begun, so that this retry, which has
        that place in the file, is the first trap of a new one."""
        request.restart(event.seq, place)
        if self._walk.journal is not None:
            self._walk.journal.restart(request)

    def answered(self, request: ReplayedRequest) -> None:
        """A request was answered for good."""
        if self._walk.journal is not None:
            self._walk.journal.answer(request)

    def find(self, seq: int) -> ReplayedRequest | None:
        """The request of a trap, or one that was answered and whose handler still unwinds."""
        return self._requests.find(seq) or self._unwinding.get(seq)

    def unwinds(self, request: ReplayedRequest) -> None:
        """A request is compared: its handler may go on all the same, having been cut off."""
        # A journal has the steps of one that is cut off now, too.
        is_cut = request.cut or (self._walk.journal is not None and request.answered)
        if is_cut and not request.ended and len(self._unwinding) < _MAX_UNWINDING:
            for seq in (request.event.seq, *request.seqs):
                self._unwinding[seq] = request
        if not request.cut or request.ended:
            request.free = True
            request.go_on()

    def let_go(self) -> None:
        """The replay has ended: no handler is held any more."""
        self.fetched.is_over = True
        if self._walk.journal is not None:
            self._walk.journal.stop(self._vm)
        self._requests.let_go()
        for request in list(self._unwinding.values()):
            request.over = request.free = True
            request.go_on()

    @property
    def is_asked(self) -> bool:
        """Whether handlers begin, go on and end as it says."""
        return self.has_steps and self.engine is not None

    def conduct(self, engine: ConductedEngine) -> None:
        """The engine is about to run."""
        self.engine = engine

    def turn(self, event: TrapEvent) -> Awaitable[None] | None:
        """A handler is about to line up, or to begin."""
        request = self.find(event.seq)
        if request is None or not self.has_steps or request.has_turn:
            return None
        request.has_turn = True
        request.turns += 1
        if not request.queued:
            # It may be behind others now, and was not then.
            request.begun = True
            return None
        number = request.turns
        if _may_begin(request, number):
            return None
        return self._walk.hold(request, lambda: _may_begin(request, number))

    def lines_up(self, event: TrapEvent) -> bool:
        """Whether a handler may not begin yet."""
        request = self.find(event.seq)
        if request is None or not self.has_steps or request.has_turn:
            return False
        return not _may_begin(request, request.turns + 1)

    def began(self, event: TrapEvent) -> None:
        """A handler begins, now."""
        self._walk.running += 1
        request = self.find(event.seq)
        if request is not None:
            request.begun, request.ended = True, False
            request.has_turn, request.has_run = False, True
            if self._walk.journal is not None:
                self._walk.journal.step(request, "began")
            # Its reply was read if it did not wait then.
            request.free = request.closes
            if self._walk.what is _BEGUN and request is self._walk.awaited:
                self._walk.go()

    def step(self, event: TrapEvent) -> Awaitable[None] | None:
        """A handler that was suspended is about to go on."""
        request = self.find(event.seq)
        if request is None or not self.has_steps:
            return None
        if _is_free(request):
            request.steps_made += 1
            self._walk.further_step()
            return None
        if request.steps_done < request.steps_allowed and not request.throws:
            self._has_gone_on(request)
            return None
        return self._hold(request)

    async def _hold(self, request: ReplayedRequest) -> None:
        await self._walk.hold(
            request, lambda: _is_free(request) or request.steps_done < request.steps_allowed
        )
        try:
            if request.throws:
                request.throws = False
                # It was cancelled in the moment in which what it waited for was there. On asyncio
                # it gets the cancellation.
                await anyio.lowlevel.checkpoint_if_cancelled()
        finally:
            self._has_gone_on(request)

    def _has_gone_on(self, request: ReplayedRequest) -> None:
        request.steps_made += 1
        if self._walk.journal is not None:
            self._walk.journal.goes_on(request)
        request.steps_done += 1
        self._going = request
        self._walk.go()
        self._going = None

    def skips(self, event: TrapEvent) -> None:
        """A recorded step is none on this loop."""
        request, journal = self.find(event.seq), self._walk.journal
        if request is not None and journal is not None:
            journal.forget(request)

    def play(self, time: int, message: object) -> bool:
        """Another message than those of traps and memory. `False`: it is not its time yet.

        No handler is asked where an agent carries the traps."""
        if isinstance(message, Step):
            return self._play_step(time, message)
        if isinstance(message, Note):
            if message.kind == "lost" and message.seq is None and len(self.gaps) < _MAX_GAPS:
                self.gaps.append(message.text)
            return True
        if self.engine is None or not isinstance(message, Outside):
            return True
        return self.fetched.play(time, message)

    def _play_step(self, time: int, step: Step) -> bool:
        request = self.find(step.seq)
        if request is None or not self.is_asked:
            return True
        if (request.answered and not request.cut) or request.is_in_time:
            return True
        if step.kind == "queued":
            request.queued = True
            return True
        if not self._walk.is_due(time):
            return False
        if step.kind in ("parked", "cut off"):
            return self._play_deadline(request, time, is_hard=step.kind == "cut off")
        if request.told and not request.cut and step.kind in HEARS and self._ends_now():
            # Answered WAIT, it did not ask again: the server has cancelled its handler with its VM.
            request.cut = True
            self.let_pass(request, OutcomeKind.TIMEOUT)
        request.last_step = self._walk.time.mark(time)
        match step.kind:
            case "began":
                request.turns_allowed += 1
                is_held = request.has_turn and request.turns >= request.turns_allowed
                request.begun = request.begun and not is_held
                what = Awaited.BEGUN
            case "resumed" | "thrown":
                request.steps_allowed += 1
                request.throws = step.kind == "thrown"
                what = Awaited.RESUMED
            case _:
                request.free = True
                what = Awaited.ENDED
        request.go_on()
        self._walk.wait_for(request, what)
        return True

    def _ends_now(self) -> bool:
        return ends_now(self._walk.ahead(), self._recorded)

    def _play_deadline(self, request: ReplayedRequest, time: int, *, is_hard: bool) -> bool:
        if not is_hard and (request.cut or request.ended):
            # An accepted recording: its answer came before the guest of then was told to wait.
            return True
        assert self.engine is not None
        if is_hard and self.cut_offs.is_in_time(request, time, self.engine):
            request.is_in_time = request.free = True
            request.go_on()
            return True
        # It has made by then the step before, and read what was read: without its trap it would
        # wait for the next one.
        if request is self._going and self._walk.looks_again():
            return False
        if request.has_pending and self._walk.lets_go_on(request):
            return False
        request.cut = is_hard
        if request.cut and not self.cut_offs.may_pass(request, time):
            return False
        request.parked = True
        return self.let_pass(request, OutcomeKind.TIMEOUT if is_hard else OutcomeKind.WAITING)

    async def outside(self, event: TrapEvent, key: str, number: int) -> OutsideCall | None:
        """A handler calls `vmi.outside`."""
        return await self.fetched.get(event, key, number)

    def called_outside(self, event: TrapEvent, call: OutsideCall) -> None:
        """A function was called."""
        self.fetched.keep(event, call)

    def ended(self, event: TrapEvent) -> None:
        """A handler has ended, now."""
        self._walk.running -= 1
        request = self.find(event.seq)
        if request is not None:
            request.ended = True
            if self._unwinding:
                for seq in (request.event.seq, *request.seqs):
                    self._unwinding.pop(seq, None)
            if self._walk.what in _AT_ENDS and request is self._walk.awaited:
                self._walk.go()

    def let_pass(self, request: ReplayedRequest, kind: OutcomeKind) -> bool:
        """A deadline passed then: now, too. `False`: it is too early."""
        assert self.engine is not None
        first = request.first
        if kind is OutcomeKind.TIMEOUT:
            passed = self.engine.time_out(first)
        else:
            request.final_wait = request.queued and not request.turns_allowed
            if request.wants_retry:
                # It was told so before.
                return True
            passed = self.engine.tell_to_wait(first)
        # A handler that has just begun is not suspended yet, or it never will be.
        return passed or request.ended or not self._walk.looks_again()

    def postpones(self, first: int) -> float:
        """A deadline has passed that nobody has let pass. As long as the recording says when it
        did, it passes then: the loop of then, or that of now, may have stood still."""
        request = self.find(first)
        if request is None or not self.has_steps or request.is_in_time:
            return 0.0
        if request.over:
            return 0.0 if request.has_run else self._walk.makes_way(request)
        return self._walk.postpones(request)

    def retry_of(self, event: TrapEvent) -> int | None:
        """The first trap of the request that a trap asks for again, as it did then."""
        request = self.find(event.seq)
        if request is None or request.event.seq == event.seq:
            return None
        return request.first

    def wall_time(self, event: TrapEvent) -> int:
        """When the trap was taken."""
        request = self.find(event.seq)
        if request is not None:
            self._last = request.time
        # Of a handler that was answered for there is no request any more.
        return self._clock + self._last


def _may_begin(request: ReplayedRequest, number: int) -> bool:
    """Whether the handler of a request may line up, for that time."""
    return not request.queued or request.over or request.free or number <= request.turns_allowed


def _is_free(request: ReplayedRequest) -> bool:
    """Whether it goes on as it likes."""
    return request.free
