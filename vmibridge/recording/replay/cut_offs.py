"""Whether a handler of a recorded VM that was cut off, by its hard deadline, is cut off now."""

from collections.abc import Sequence
from typing import Any, Final

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import timeout_in
from vmibridge.recording.messages import RecordedHandler, Reply, Session
from vmibridge.recording.replay.ahead import comes_outside, next_step, reply_then
from vmibridge.recording.replay.changes import is_as_recorded
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.conductor import ConductedEngine

__all__ = ["HEARS", "CutOffs"]

HEARS: Final = ("resumed", "thrown")
"""In which steps a handler hears that it was cut off."""
_JITTER = 0.005
"""Seconds by which a loop may be late."""
_EARLY = 2_000_000
"""Nanoseconds from a deadline to a step of its handler, at most, where a timer was early."""


class CutOffs:
    """Those of one VM."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._recorded = self._loop = ""
        self._is_accepted = False
        self._recorded_handlers: Sequence[RecordedHandler] = ()
        self._handlers: Sequence[BridgeHandler[Any]] = ()
        self._same: dict[str | None, bool] = {}
        """By name, whether a handler is as it was recorded, where that was asked."""

    def begin(self, session: Session) -> None:
        """This is what was recorded of the VM."""
        self._recorded, self._loop = session.vm, session.loop
        self._is_accepted, self._recorded_handlers = session.accepted, session.handlers

    def hear_handlers(self, handlers: Sequence[BridgeHandler[Any]]) -> None:
        """These serve the VM now."""
        self._handlers = handlers

    def is_in_time(self, request: ReplayedRequest, time: int, engine: ConductedEngine) -> bool:
        """Whether a handler that was cut off then, at a time, would not have been as it is now: it
        has a later deadline, or is another one, and what it waits for was there well before."""
        if not request.has_run or self._is_accepted:
            return False
        reply = reply_then(self._walk.ahead(), self._recorded, request)
        then = None if reply is None else timeout_in(reply.error)
        passed = (time - request.time) / 1e9
        # Else the loop stood still then.
        if then is None or not 0.99 * then <= passed <= 1.05 * then + _JITTER:
            return False
        now = engine.timeout_of(request.first)
        if now is None:
            return False
        since = self._walk.held_since(request)
        if not self._walk.is_held(request) and comes_outside(
            self._walk.ahead(), self._recorded, request
        ):
            since = None
        at = time if since is None else since
        needed = (at - max(request.time, request.given or 0)) / 1e9
        if now <= 1.1 * then + _JITTER and (
            since is None or needed >= 0.9 * then - _JITTER or self._is_as_recorded(reply)
        ):
            return False
        # It was held from then on.
        engine.allow(request.first, now - needed)
        return True

    def _is_as_recorded(self, reply: Reply | None) -> bool:
        """Whether the handler of a recorded reply is the same now: it was cut off all the same,
        where the loop stood still until its deadline."""
        name = None if reply is None else reply.handler
        if name not in self._same:
            then = {each.name: each for each in self._recorded_handlers}.get(name or "")
            now = {each.name: each for each in self._handlers}.get(name or "")
            self._same[name] = then is not None and now is not None and is_as_recorded(then, now)
        return self._same[name]

    def may_pass(self, request: ReplayedRequest, time: int) -> bool:
        """Whether a hard deadline that passed then may pass now; else the walk goes on when it may.

        The handler was resumed after that: so what it waited for was there, and it did not get the
        cancellation. By the clock of now it may be there later: a timer of uvloop counts from when
        the loop last looked at its clock, in milliseconds, and so is early.
        """
        if not self._walk.is_as_late(request, time):
            return False
        if not request.begun or request.ended:
            return True
        after = next_step(self._walk.ahead(), self._recorded, request)
        kind, at = (None, time) if after is None else after
        if not self._walk.is_held(request):
            # Trio's timers are not early: what goes on there cannot be cancelled, or waits for a
            # trap that asks again. So does what goes on later.
            is_early = kind == "resumed" and at - time < _EARLY and self._loop != "trio"
            return not is_early or request.needs_behind or not self._walk.looks_later()
        # What it waited for then did not come: a step that it can make is one more than then.
        return kind in HEARS or not self._walk.lets_go_on(request)
