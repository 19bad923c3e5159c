"""What came of the requests of one VM of a recording, counted."""

from collections.abc import Callable

from vmibridge.bridge.outcome import STOPPED, OutcomeKind
from vmibridge.bridge.request import request_in
from vmibridge.recording.messages import Reply, Session
from vmibridge.recording.redaction import Redaction
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.options import NO_REPLY, ReplayResult
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.vm.trap import TrapEvent

__all__ = ["Tally"]


_NOTHING: frozenset[str] = frozenset()


class Tally:
    """Compares requests that are done, and counts those that cannot be."""

    def __init__(
        self, verdict: Verdict, on_difference: Callable[[Difference], None] | None
    ) -> None:
        self.verdict: Verdict = verdict
        self.result: ReplayResult = ReplayResult()
        self.started: int = 0
        """When the first trap was taken then, in nanoseconds since the Unix epoch."""
        self._on_difference = on_difference
        self._vm = ""
        self._redaction = Redaction()
        self._redacts = False
        self.keeps: bool = verdict.accepted is not None
        """Whether all accesses of a request are kept."""

    def begin(self, vm: str, session: Session | None, stop: Callable[[], None]) -> None:
        """The VM is found: its recorded name, what served it, and how its replay is ended."""
        self._vm = vm
        self._redaction = Redaction(() if session is None else session.redaction)
        self._redacts = bool(self._redaction.rules)
        self.verdict.begin_vm(session, stop)

    def is_behind(self, event: TrapEvent, time: int) -> bool:
        """Whether a trap was taken after all that are compared."""
        self.started = self.started or time
        verdict = self.verdict
        return verdict.selects and verdict.is_behind(event.seq, time, self.started)

    def left_out(self, event: TrapEvent) -> frozenset[str]:
        """What the recording lacks of a request: `memory`, names of values."""
        packet = request_in(event) if self._redacts else None
        return _NOTHING if packet is None else self._redaction.of(packet.request)

    def close(self, request: ReplayedRequest, why: str | None) -> None:
        """A request is done; `why`: it cannot be compared."""
        reply = request.reply
        if reply is None:
            why = why or NO_REPLY
        elif reply.kind is OutcomeKind.CANCELLED and reply.error == STOPPED:
            why = "the server stopped before its answer"
        why = request.unchecked or why
        if reply is None or why is not None:
            self.leave_unchecked(why or NO_REPLY, request.event, request.time, reply)
            return
        verdict = self.verdict
        if verdict.selects and not self._is_selected(request.event, request.time, reply):
            return
        whole = not (self._redacts and self.left_out(request.event))
        difference = request.compare(whole=whole)
        if difference is None and request.unchecked is not None:
            self._count_unchecked(request.unchecked)
            return
        result = self.result
        result.compared += 1
        if difference is None and not verdict.counts:
            return
        counts = verdict.judge(self._vm, request, difference)
        if counts is None:
            result.ignored += difference is not None
            return
        result.different += 1
        result.first = result.first or counts
        if self._on_difference is not None:
            self._on_difference(counts)

    def leave_unchecked(
        self, why: str, event: TrapEvent, time: int, reply: Reply | None = None
    ) -> None:
        """A request cannot be compared."""
        if self._is_selected(event, time, reply):
            self._count_unchecked(why)

    def _count_unchecked(self, why: str) -> None:
        unchecked = self.result.unchecked
        unchecked[why] = unchecked.get(why, 0) + 1

    def _is_selected(self, event: TrapEvent, time: int, reply: Reply | None) -> bool:
        if not self.verdict.selects:
            return True
        packet = request_in(event)
        return self.verdict.takes(self._vm, event, time, packet, reply, self.started)
