"""A recording as a backend: the guest is played from the file, with no VM at all.

    replay:FILE.mcap?speed=0&order=recorded&vm=NAME&strict=false&outside=call

Rules:

- The file is walked in its order, once, for all VMs that are replayed from it (`walk`, which has
  the order of things). A trap is given to the server; a memory access is kept for its request; a
  reply holds the walk until the server has answered that trap, too. With `order=vcpu` replies hold
  the traps of their vCPU only, and what handlers do is in the recorded order all the same.
- Memory is served from the recording, to the request that accessed it (`replayed`).
- Deadlines pass when they passed then; another one when the walk has been stuck for a while.
- A request that was told to wait then, and is answered at once now, is done, without its retries.
  One that is told to wait now asks again, with the recorded ones.
- Left out are later runs of a VM, which had handlers of their own; requests that began in another
  file; traps that the policy denied then; and those whose values are not in the recording.

What is held is bounded (`memory`), and not by the file.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import GONE, Outcome, OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.errors import BackendSpecError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import (
    MemoryAccess,
    Note,
    PlainTrap,
    Reply,
    Session,
    Step,
    architecture_of,
)
from vmibridge.recording.replay import options as reasons
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.delivery import Delivery
from vmibridge.recording.replay.memory import ReplayedMemory
from vmibridge.recording.replay.not_asked import NotAsked
from vmibridge.recording.replay.open_requests import MAX_OPEN, OpenRequests
from vmibridge.recording.replay.options import ReplayOptions, ReplayResult
from vmibridge.recording.replay.order import RecordedOrder
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.request_result import RequestResult
from vmibridge.recording.replay.tally import Tally
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

_DEADLINES = (OutcomeKind.WAITING, OutcomeKind.TIMEOUT, OutcomeKind.CANCELLED)


class ReplayBackend(Backend, Tap):
    """One VM of a recording. Raises `BackendSpecError` if an option is out of range."""

    def __init__(
        self,
        path: Path,
        options: ReplayOptions | None = None,
        vm: str = "vm",
        on_difference: Callable[[Difference], None] | None = None,
        *,
        walk: Walk | None = None,
        verdict: Verdict | None = None,
        on_request: Callable[[RequestResult], None] | None = None,
    ) -> None:
        """VMs of one file that are replayed together have a `walk` in common."""
        super().__init__(vm)
        options = options or ReplayOptions()
        if not 0 <= options.speed < math.inf:
            raise BackendSpecError(f"replay:{path}: speed={options.speed} is not a number from 0")
        self.path = path
        self.options = options
        self.session: Session | None = None
        """What served this VM then; known once the backend is open, if the file tells."""
        self.walk: Walk = walk or Walk(path, options.speed)
        """What plays the file, for all VMs that are replayed together."""
        self._tally = Tally(vm, verdict or Verdict(), on_difference, on_request)
        self._name = vm
        self._has_begun = self._is_later = False
        self._requests = OpenRequests(self.walk, self._tally, options)
        self._open = self._requests.by_seq
        self._plays_plain = False
        self._not_asked = NotAsked()
        self._stopped = False
        self.conductor: RecordedOrder = RecordedOrder(self.walk, self._requests, options)
        self._tally.result.outside = self.conductor.fetched.called
        self._memory = ReplayedMemory(self.walk, self._requests)
        self._traps = Delivery(
            self.walk,
            self._requests,
            self.conductor,
            self._memory,
            self._tally,
            self.stop,
            by_vcpu=options.order == "vcpu",
        )
        self._stop_for: Callable[[Exception], None]

    @property
    def result(self) -> ReplayResult:
        """What came of it so far."""
        return self._tally.result

    @property
    def started(self) -> int:
        """When the first trap was taken then, in nanoseconds since the Unix epoch; 0 until then."""
        return self._tally.started

    # --- the life of a backend ------------------------------------------------------

    async def open(self) -> None:
        """Open the file and find the VM.

        Raises `RecordingReadError` for a file that is not a recording, `BackendSpecError` for a
        VM that is not in it.
        """
        self._name, self.session = await self.walk.join(self, self.options.vm)
        journal = self.walk.journal = self._tally.journal
        if self.session is not None:
            self.architecture = architecture_of(self.session)
            self._traps.wait = self.session.settings.wait.value1
            self.conductor.begin(self.session)
        self._tally.begin(self._name, self.session, self.stop, self._open.values)
        if journal is not None:
            self.conductor.note_steps(journal, self.vm, self._name)
            # Assigned, and not a method: the engine reports steps of handlers only to a tap that
            # defines this hook, and only a replay with a journal needs them.
            self.handler_stepped = self.conductor.stepped  # type: ignore[method-assign]

    @property
    def reader(self) -> RecordingReader:
        """What reads the file; once the backend is open."""
        return self.walk.source.reader

    def unanswered(self) -> list[TrapEvent]:
        """Traps that wait for their answers; any thread may ask."""
        return [*self._traps.unanswered.copy().values()]

    async def close(self) -> None:
        self.walk.leave()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Play the recording to its end."""
        self._traps.sink = sink
        self.walk.present(self._name)
        try:
            await self.walk.drive(self)
        finally:
            self.conductor.let_go()
        for request in dict.fromkeys(self._open.values()):
            self._traps.close(request, "the recording ends before its answer")
        ends = [
            VcpuEnd(vcpu, "stopped" if self._stopped else "halted", "the recording ends here")
            for vcpu in sorted(self._traps.vcpus)
        ]
        return GuestEnd(tuple(ends))

    def stop(self) -> None:
        """Play no further."""
        self._stopped = True
        self.walk.present(self._name)
        self._requests.unfold()
        self.walk.let_go(self._open.values())
        self.conductor.let_go()
        self._memory.arrive()
        self.walk.go()

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Take the answer. Raises `BackendError` for a trap that waits for none."""
        self._traps.resume(event, writes)

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """The recorded bytes. Waits where the recording was not read as far."""
        return await self._memory.read(self._traps.played(event), address, size)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """As it went then. Waits where the recording was not read as far."""
        await self._memory.write(self._traps.played(event), address, data)

    def begin(
        self, vm: str, bridge: Bridge, settings: ServerSettings, stop: Callable[[Exception], None]
    ) -> None:
        self._stop_for = stop
        self._traps.has_server = True
        self._plays_plain = self.options.order == "recorded"
        self._tally.verdict.hear_handlers(self._name, bridge.handlers)
        self.conductor.cut_offs.hear_handlers(bridge.handlers)

    def dropped(self, vm: str, error: Exception) -> None:
        """Without these calls it cannot go on: it would wait for ever."""
        self._stop_for(error)

    def trap(self, event: TrapEvent) -> None:
        plain = event is self._requests.plain
        request = None if plain else self._open.get(event.seq)
        if request is not None and not request.taken:
            request.taken = True
            self.conductor.took(request, event)
            if self.walk.what is Awaited.TAKEN:
                self.walk.go()

    def answered(self, outcome: Outcome[Any]) -> None:
        event, requests = outcome.event, self._requests
        assert event is not None
        if event is requests.plain and requests.end_plain(outcome):
            self.walk.go()
        else:
            self._traps.answer(event, outcome)

    # --- what the walk plays --------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is played any more."""
        return self._stopped

    @property
    def is_owed(self) -> bool:
        """Whether a trap of it waits for its answer."""
        return bool(self._traps.unanswered) or self._requests.plain is not None

    @property
    def needs_behind(self) -> bool:
        """Whether a handler of it waits for what is behind in the file."""
        return any(each.needs_behind for each in self._open.values())

    def at_end(self) -> None:
        """Nothing more was recorded: what is open is answered as it comes."""
        self._requests.let_go()
        self._memory.arrive()

    def play_plain(self, time: int, event: TrapEvent, then: Reply | PlainTrap) -> bool:
        """Play a trap with its reply. `False`: they are to be played one after the other."""
        if not self._plays_plain or self._is_later:
            return False
        if event.vm != self.vm:
            event = msgspec.structs.replace(event, vm=self.vm)
        if not self._requests.begin_plain(time, event, then):
            return False
        self._has_begun = True
        self._traps.give_plain(event)
        return True

    def play(self, message: TimedMessage, after: object) -> bool:
        """Play a message; `after`: the one behind it. `False`: it is not its time yet."""
        time, what = message
        if isinstance(what, TrapEvent):
            then = self._tally.next_of(what, after)
            if isinstance(then, Reply) and self.play_plain(time, what, then):
                self.walk.skip()
                return True
            return self._walk_trap(time, what, after)
        if isinstance(what, MemoryAccess):
            return self._is_later or self._memory.attach(what)
        if isinstance(what, Reply):
            return self._walk_reply(time, what)
        if isinstance(what, Session):
            self._is_later = self._has_begun
            self._has_begun = True
        return self._is_later or self.conductor.play(time, what)

    def _walk_trap(self, time: int, event: TrapEvent, after: object) -> bool:
        self._has_begun = True
        if self._is_later:
            self._tally.leave_unchecked(reasons.LATER, event, time)
            return True
        if self._tally.is_behind(event, time):
            return True
        if not self.walk.is_due(time) or (
            self._traps.is_busy(event.vcpu) and self.conductor.is_asked
        ):
            # Its vCPU has not gone on yet, and what comes next is to come after this.
            return False
        if len(self._open) >= MAX_OPEN:
            if self._traps.unanswered:
                return False
            self._traps.close(next(iter(self._open.values())), reasons.NO_REPLY)
        if event.seq in self._open:
            self._tally.leave_unchecked(reasons.TWICE, event, time)
            return True
        if event.vm != self.vm:
            event = msgspec.structs.replace(event, vm=self.vm)
        about = self._tally.next_of(event, after)
        if isinstance(about, Note):
            if about.retry_of in self._open:
                self._walk_retry(self._open[about.retry_of], event)
            elif about.retry_of not in self._not_asked:
                # What it did before is in another file, or lost.
                self._tally.leave_unchecked(reasons.BEFORE, event, time)
                self._not_asked.add(about.retry_of or event.seq)
            return True
        if (why := self._tally.why_not(event, about)) is not None:
            denial = about if isinstance(about, Reply) else None
            self._tally.leave_unchecked(why, event, time, denial)
            self._not_asked.add(event.seq)
            return True
        request = self._requests.begin(time, event)
        request.queued = isinstance(about, Step) and about.kind == "queued"
        if (
            isinstance(about, Reply)
            and about.kind not in _DEADLINES
            and self.options.order == "recorded"
        ):
            # The usual case: nothing else happened before it was answered.
            request.over = request.closes = request.free = True
            request.reply = about
            self.walk.skip()
            request.recorded_place = self.walk.place()
            self._traps.give(request, event, Awaited.ANSWERED)
            return True
        request.last_step = self.walk.time.mark(time)
        waits = self.conductor.is_asked and not request.queued
        self._traps.give(request, event, Awaited.BEGUN if waits else Awaited.TAKEN)
        return True

    def _walk_retry(self, request: ReplayedRequest, event: TrapEvent) -> None:
        request.seqs = (*request.seqs, event.seq)
        self._open[event.seq] = request
        retry = event, self.walk.place()
        if request.wants_retry:
            request.wants_retry = False
            self._traps.give_retry(request, *retry)
        elif request.answered:
            return
        elif self.options.order == "recorded" and self.conductor.is_refused(request, event.seq):
            self._traps.give_refused(request, event)
        else:
            request.retries.append(retry)

    def _walk_reply(self, time: int, reply: Reply) -> bool:
        request = None if self._is_later else self._open.get(reply.seq)
        if request is None:
            self._not_asked.hear(reply)
            return True
        is_owed = reply.seq in self._traps.unanswered and self.conductor.engine is not None
        if is_owed and not self._walk_deadline(time, request, reply):
            return False
        if reply.kind is OutcomeKind.WAITING and not request.final_wait:
            return True
        if reply.kind is OutcomeKind.WAITING and request.wants_retry and request.is_forgotten:
            # It was told so before, and the server has forgotten it, as it had then.
            request.wants_retry, request.answered = False, True
            self.conductor.answered(request)
        if not request.over:
            request.over, request.reply = True, reply
            request.recorded_place = self.walk.place()
            request.free = request.free or not request.cut
            request.go_on()
            if request.blocked:
                self._memory.arrive()
            if request.wants_retry:
                # The recorded retries are used up: it is slower now.
                request.wants_retry = False
                self._traps.ask_on(request)
        if request.answered:
            self._traps.close(request)
        elif self.options.order == "recorded":
            self.walk.wait_for(request, Awaited.ANSWERED)
            request.closes = True
        return True

    def _walk_deadline(self, time: int, request: ReplayedRequest, reply: Reply) -> bool:
        if reply.kind not in _DEADLINES:
            return True
        if reply.kind is OutcomeKind.CANCELLED:
            if reply.error == GONE:
                self._traps.abandon(reply.seq)
        elif not self.conductor.has_steps:
            return self.walk.is_due(time) and self.conductor.let_pass(request, reply.kind)
        elif reply.kind is OutcomeKind.WAITING and not request.final_wait:
            self.walk.wait_for(request, Awaited.TOLD)
        return True
