"""What came of the requests of one VM of a recording, counted."""

from collections.abc import Callable, Iterable

from vmibridge.bridge.outcome import STOPPED, OutcomeKind
from vmibridge.bridge.request import request_in
from vmibridge.recording.messages import Reply, Session
from vmibridge.recording.redaction import Redaction
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.journal import Journal
from vmibridge.recording.replay.options import NO_REPLY, ReplayResult
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.request_result import NOT_SELECTED, RequestResult
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.vm.trap import TrapEvent

__all__ = ["Tally"]


_NOTHING: frozenset[str] = frozenset()
_DENIED = OutcomeKind.DENIED


class Tally:
    """Compares requests that are done, and counts those that cannot be."""

    def __init__(
        self,
        vm: str,
        verdict: Verdict,
        on_difference: Callable[[Difference], None] | None,
        on_request: Callable[[RequestResult], None] | None = None,
    ) -> None:
        """`vm`: its name now. `on_difference` gets what counts of each difference, `on_request`
        each request."""
        self._now = vm
        self.verdict: Verdict = verdict
        self.result: ReplayResult = ReplayResult()
        self.started: int = 0
        """When the first trap was taken then, in nanoseconds since the Unix epoch."""
        self._on_difference = on_difference
        self._on_request = on_request
        self._vm = ""
        self._redaction = Redaction()
        self._redacts = False
        self._looks_at_each = True
        self.journal: Journal | None = (
            None if verdict.accepted is None else verdict.accepted.journal
        )
        """Of what handlers do, where their answers are accepted."""

    def begin(
        self,
        vm: str,
        session: Session | None,
        stop: Callable[[], None],
        requests: Callable[[], Iterable[ReplayedRequest]],
    ) -> None:
        """The VM is found: its recorded name, what served it, how its replay is ended, and what
        gives its open requests."""
        self._vm = vm
        self._redaction = Redaction(() if session is None else session.redaction)
        self._redacts = bool(self._redaction.rules)
        has_journal = self.journal is not None
        self._looks_at_each = has_journal or self._redacts or self._on_request is not None
        self.verdict.begin_vm(vm, session, stop, requests)

    @property
    def is_simple(self) -> bool:
        """Whether a request that is the same is counted, and nothing else comes of it."""
        verdict = self.verdict
        return not (verdict.selects or verdict.counts or self._looks_at_each)

    def is_behind(self, event: TrapEvent, time: int) -> bool:
        """Whether a trap was taken after all that are compared had been answered."""
        self.started = self.started or time
        verdict = self.verdict
        return verdict.selects and verdict.is_behind(self._vm, event.seq, time, self.started)

    def next_of(self, event: TrapEvent, after: object) -> object:
        """What was recorded of a trap next, if that is the message behind it; else `None`."""
        is_of_it = getattr(after, "seq", None) == event.seq
        return after if is_of_it and getattr(after, "vm", None) == self._vm else None

    def why_not(self, event: TrapEvent, about: object) -> str | None:
        """Why a trap is not asked; `about`: what was recorded of it next."""
        if isinstance(about, Reply) and about.kind is _DENIED:
            return "the policy denied it"
        left_out = self.left_out(event) - {"memory", "outside"}
        if left_out:
            return f"{', '.join(sorted(left_out))} was left out of the recording"
        return None

    def left_out(self, event: TrapEvent) -> frozenset[str]:
        """What the recording lacks of a request: `memory`, names of values."""
        packet = request_in(event) if self._redacts else None
        return _NOTHING if packet is None else self._redaction.of(packet.request)

    def close(self, request: ReplayedRequest, why: str | None) -> None:
        """A request is done; `why`: it cannot be compared."""
        difference, unchecked = self._compare(request, why)
        if difference is not None and self._on_difference is not None:
            self._on_difference(difference)
        self._tell(request.event, request.time, request.reply, request, difference, unchecked)

    def _compare(
        self, request: ReplayedRequest, why: str | None
    ) -> tuple[Difference | None, str | None]:
        """What counts of what differs, and why it was not compared."""
        reply = request.reply
        if reply is None:
            why = why or NO_REPLY
        elif reply.kind is OutcomeKind.CANCELLED and reply.error == STOPPED:
            why = "the server stopped before its answer"
        why = request.unchecked or why
        if reply is None or why is not None:
            return None, self._leave_out(why or NO_REPLY, request.event, request.time, reply)
        verdict = self.verdict
        if verdict.selects and not self._is_selected(request.event, request.time, reply):
            return None, NOT_SELECTED
        whole = not (self._redacts and self.left_out(request.event))
        difference = request.compare(whole=whole)
        if verdict.accepted is not None:
            verdict.accepted.move(self._vm, request)
        if difference is None and request.unchecked is not None:
            self._count_unchecked(request.unchecked)
            return None, request.unchecked
        result = self.result
        result.compared += 1
        if difference is None and not verdict.counts:
            return None, None
        counts = verdict.judge(self._vm, request, difference)
        if counts is None:
            result.ignored += difference is not None
            return None, None
        result.different += 1
        if result.first is None or counts.time < result.first.time:
            # It may have been answered later: what began first is told with its cause.
            result.first = counts
        return counts, None

    def _tell(
        self,
        event: TrapEvent,
        time: int,
        reply: Reply | None,
        request: ReplayedRequest | None = None,
        difference: Difference | None = None,
        unchecked: str | None = None,
    ) -> None:
        """Tell of one request; `request`: it was asked."""
        if self._on_request is None:
            return
        outcome = None if request is None else request.outcome
        handler = None if reply is None else reply.handler
        if handler is None and outcome is not None:
            handler = outcome.handler
        packet = request_in(event)
        self._on_request(
            RequestResult(
                self._now,
                event.vcpu,
                event.seq,
                time,
                event,
                packet,
                handler,
                self.verdict.method_name(self._vm, handler, packet),
                reply,
                outcome,
                () if request is None else tuple(request.seqs),
                () if request is None else request.latest_accesses,
                difference,
                unchecked,
            )
        )

    def leave_unchecked(
        self, why: str, event: TrapEvent, time: int, reply: Reply | None = None
    ) -> None:
        """A request is not asked, and so not compared."""
        self._tell(event, time, reply, unchecked=self._leave_out(why, event, time, reply))

    def _leave_out(self, why: str, event: TrapEvent, time: int, reply: Reply | None) -> str:
        if not self._is_selected(event, time, reply):
            return NOT_SELECTED
        self._count_unchecked(why)
        return why

    def _count_unchecked(self, why: str) -> None:
        unchecked = self.result.unchecked
        unchecked[why] = unchecked.get(why, 0) + 1

    def _is_selected(self, event: TrapEvent, time: int, reply: Reply | None) -> bool:
        if not self.verdict.selects:
            return True
        packet = request_in(event)
        return self.verdict.takes(self._vm, event, time, packet, reply, self.started)
