"""Whether a request is what the walk over a recording waits for it to be (`walk`)."""

from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest

__all__ = ["is_met"]


def is_met(request: ReplayedRequest, what: Awaited) -> bool:
    """Whether that is what it is, or will never be."""
    # A handler that was forgotten before it began makes no steps before the next retry.
    answered = request.answered or (request.wants_retry and request.is_forgotten)
    match what:
        case Awaited.TAKEN:
            return request.taken or answered
        case Awaited.BEGUN:
            return request.begun or answered
        case Awaited.RESUMED:
            done = request.ended or request.steps_done >= request.steps_allowed
            return done or not request.begun or (answered and not request.cut)
        case Awaited.ENDED:
            return request.ended or not request.begun or (answered and not request.cut)
        case Awaited.READ:
            return not request.reads or request.ended or answered
        case Awaited.FETCHED:
            done = request.outside.awaited is None or request.ended or not request.begun
            return done or (answered and not request.cut)
        case Awaited.REFUSED:
            return request.refused is None or answered
        case Awaited.TOLD:
            # The answer waits for an access that is under way.
            return request.told or answered or request.blocked
        case Awaited.ANSWERED:
            return answered
