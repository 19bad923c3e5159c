"""The requests of one VM that a replay has asked, and not compared yet.

A *plain* trap is one whose reply is what was recorded next, as of nearly all. It is given to the
server, the walk waits for its answer, and that is compared with the recorded one. So it needs no
`ReplayedRequest`, as long as its handler does what it did then: answer, and nothing else. It
becomes one (`find`, `unfold`) and is played as any other from there on, when

- its handler is suspended, or accesses guest memory, or asks for anything else that was recorded;
- it is told to wait, runs natively, or is answered in any other way than it was;
- another handler is held, which the walk may have to let go;
- the replay is stopped.
"""

from typing import Any

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.recording.messages import PlainTrap, Reply
from vmibridge.recording.replay.compare import is_cut, is_same
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.tally import Tally
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.conductor import Conductor
from vmibridge.vm.trap import TrapEvent

__all__ = ["MAX_OPEN", "OpenRequests"]

MAX_OPEN = 16_384
"""Requests that may be open at a time."""
_SPECIAL = (
    OutcomeKind.WAITING,
    OutcomeKind.TIMEOUT,
    OutcomeKind.CANCELLED,
    OutcomeKind.DENIED,
)
"""Outcomes that the walk brings about, and those that are not compared."""


class OpenRequests:
    """See the module. Of a VM there is one plain trap at a time, and of a walk, too."""

    def __init__(self, walk: Walk, tally: Tally, options: ReplayOptions) -> None:
        self.by_seq: dict[int, ReplayedRequest] = {}
        """By the numbers of their traps."""
        self.unanswered: dict[int, TrapEvent] = {}
        """The traps of these that wait for an answer."""
        self.plain: TrapEvent | None = None
        """The plain trap that waits for its answer."""
        self.conductor: Conductor
        """Of the VM."""
        self._time = 0
        self._then: Reply | PlainTrap
        self._walk = walk
        self._tally = tally
        self._strict = options.strict

    def find(self, seq: int) -> ReplayedRequest | None:
        """The request of a trap, which may be one of its retries."""
        if self.plain is not None and self.plain.seq == seq:
            return self.unfold()
        return self.by_seq.get(seq)

    def begin(self, time: int, event: TrapEvent) -> ReplayedRequest:
        """A trap that was taken at `time` is asked; its request."""
        journal = self._walk.journal
        keep = None if journal is None else journal.access
        request = ReplayedRequest(event, time, strict=self._strict, keep=keep)
        if journal is not None:
            journal.ask(request)
        self.by_seq[event.seq] = request
        return request

    def further_retry(self, request: ReplayedRequest) -> TrapEvent:
        """One more retry of a request, which the recording does not have."""
        event, unused = request.further_retry()
        if unused is not None:
            self.by_seq.pop(unused, None)
        self.by_seq[event.seq] = request
        return event

    def end(self, request: ReplayedRequest) -> None:
        """A request is done."""
        for seq in (request.event.seq, *request.seqs):
            self.by_seq.pop(seq, None)

    def begin_plain(self, time: int, event: TrapEvent, then: Reply | PlainTrap) -> bool:
        """A trap that was taken at `time` is about to be given to the server; its reply `then` was
        recorded next. `False`: it is not plain, or it is not its time yet."""
        requests, tally = self.by_seq, self._tally
        if (
            then.kind in _SPECIAL
            or not tally.is_simple
            or (requests and (event.seq in requests or len(requests) >= MAX_OPEN))
            or (self._walk.time.is_timed and not self._walk.is_due(time))
        ):
            return False
        tally.started = tally.started or time
        self.plain, self._time, self._then = event, time, then
        self._walk.plain, self.conductor.plain = self, event
        return True

    def end_plain(self, outcome: Outcome[Any]) -> bool:
        """The plain trap was answered. `False`: in another way than it was then."""
        then = self._then
        if not is_same(then, outcome, whole=True) or (then.output is not None and is_cut(then)):
            return False
        self._tally.result.compared += 1
        self.plain = self._walk.plain = self.conductor.plain = None
        return True

    def unfold(self) -> ReplayedRequest | None:
        """The plain trap becomes a request, if there is one."""
        event = self.plain
        if event is None:
            return None
        then = self._then
        self.plain = self._walk.plain = self.conductor.plain = None
        request = ReplayedRequest(event, self._time, strict=self._strict)
        request.taken = request.over = request.closes = request.free = True
        request.reply = then if isinstance(then, Reply) else then.reply()
        self.by_seq[event.seq] = request
        self.unanswered[event.seq] = event
        self._walk.wait_for(request, Awaited.ANSWERED)
        return request

    def let_go(self) -> None:
        """Nothing more was recorded of any of them: they are answered as it comes."""
        self.unfold()
        for request in dict.fromkeys(self.by_seq.values()):
            request.over = request.free = True
            request.go_on()
