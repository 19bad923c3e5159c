"""What the recording has of a request behind the message that is played, by what was read so far.

`ahead` are the messages behind it, `vm` is the name of the VM in the recording.
"""

from collections.abc import Iterable

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Note, Outside, Reply, Step
from vmibridge.recording.replay.request import ReplayedRequest

__all__ = ["comes_outside", "ends_now", "is_refused", "next_step", "reply_then"]


def next_step(
    ahead: Iterable[TimedMessage], vm: str, request: ReplayedRequest
) -> tuple[str, int] | None:
    """What its handler does next, and when, in nanoseconds since the Unix epoch."""
    for time, each in ahead:
        if isinstance(each, Step) and (each.vm, each.seq) == (vm, request.event.seq):
            return each.kind, time
    return None


def reply_then(ahead: Iterable[TimedMessage], vm: str, request: ReplayedRequest) -> Reply | None:
    """Its next reply; `None`: that does not come soon."""
    seqs = (request.event.seq, *request.seqs)
    for _, each in ahead:
        if isinstance(each, Reply) and each.vm == vm and each.seq in seqs:
            return each
    return None


def comes_outside(ahead: Iterable[TimedMessage], vm: str, request: ReplayedRequest) -> bool:
    """Whether a call of `vmi.outside` comes."""
    key = vm, request.event.seq
    return any(isinstance(each, Outside) and (each.vm, each.seq) == key for _, each in ahead)


def is_refused(
    ahead: Iterable[TimedMessage], vm: str, request: ReplayedRequest, retry: int
) -> bool:
    """Whether a retry, which is played now, was answered WAIT at once in the recording, because an
    earlier one was pending."""
    for _, each in ahead:
        if isinstance(each, Step) and (each.vm, each.seq) == (vm, request.event.seq):
            if each.kind == "parked":
                return False
        elif isinstance(each, Reply) and (each.vm, each.seq) == (vm, retry):
            return each.kind is OutcomeKind.WAITING
    return False


def ends_now(ahead: Iterable[TimedMessage], vm: str) -> bool:
    """Whether the VM has ended: nothing of its guest comes any more before the note of that."""
    for _, each in ahead:
        if each.vm == vm and isinstance(each, Note) and each.kind == "end":
            return True
        if each.vm == vm and not isinstance(each, Step):
            return False
    return False
