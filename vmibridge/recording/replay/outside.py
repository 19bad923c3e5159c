"""What `vmi.outside` gives in a replay: what it gave then.

A call is found by its key, and its number among those of its request with that key.

| a handler now | gets |
|---|---|
| makes a call of then | its value or its failure, at its time and in its place among the steps |
| makes one that was cut off then | nothing until it is cut off; after a while, the next line |
| makes another one | what the function gives, which is called; where it must not be, an error |
| makes one that was left out of the recording | the same, and is not compared |
| makes one that a part of the file may have that is not read | an error; it is not compared |

A call of then that is not made is a difference. Another call is one where it is refused, and in a
strict replay; else it is named where something else differs, and in the result.
"""

from collections.abc import Callable

import anyio
import msgspec

from vmibridge.aio.coroutines import cancel_again
from vmibridge.bridge.outside import MAX_KEY
from vmibridge.errors import OutsideRefusedError
from vmibridge.recording.messages import Outside
from vmibridge.recording.replay.journal import EventKind
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.player import Awaited
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.request_parts import NO_CALL
from vmibridge.recording.replay.walk import Walk
from vmibridge.vm.conductor import OutsideCall
from vmibridge.vm.trap import TrapEvent

__all__ = ["ReplayedOutside"]

_PATIENCE = 0.5
"""Seconds that a call waits to be cut off."""
_SLACK = 1.0
"""Seconds by which a timeout of a handler may pass before what came in time then."""
_MAX_HELD = 32 << 20
"""Bytes of values that may be held for requests that run."""
_MAX_KEYS = 100
_FULL = "it has more from outside than a replay holds"
_LEFT_OUT = "what came from outside was left out of the recording"
_REFUSED = "it is not in the recording, and was refused"
_MAX_TOLD = 16
"""Calls that were made, or were not any more, of one request."""


class ReplayedOutside:
    """That of one VM. `find` gives the request of a trap."""

    def __init__(
        self,
        walk: Walk,
        find: Callable[[int], ReplayedRequest | None],
        options: ReplayOptions,
    ) -> None:
        self.called: dict[str, int] = {}
        """How often functions were called, by key."""
        self._walk = walk
        self._find = find
        self._refuse = options.outside == "refuse"
        self.is_over: bool = False
        """Whether the replay has ended: what handlers still do is of no interest, and calls
        nothing."""
        self._held = 0

    # --- what the walk plays --------------------------------------------------------

    def play(self, time: int, message: Outside) -> bool:
        """A recorded call. `False`: it is not its time yet."""
        request = self._find(message.seq)
        if len(message.key) > MAX_KEY:
            return True  # no handler can ask for it
        if request is None or (request.answered and not request.cut):
            if request is not None:
                self._leave(request, message)
            return True
        if not message.at_once and not self._walk.is_due(time):
            return False
        size = _size(message)
        if self._held + size > _MAX_HELD:
            request.leave_unchecked(_FULL)
            return True
        calls = request.outside
        call = (message.key, message.number)
        if call in calls.recorded:
            return True
        self._held += size
        calls.recorded[call] = message
        if request.keeps:
            calls.read_at[call] = request.progress
        # Another one that waits does so for what is recorded later, if at all.
        if call in calls.waiting or not (message.at_once or calls.waiting):
            calls.awaited = call
            self._walk.wait_for(request, Awaited.FETCHED)
        request.go_on()
        return True

    def close(self, request: ReplayedRequest) -> None:
        """A request is done: nothing is held for it any more."""
        if not request.has_outside:
            return
        left = request.outside.recorded
        self._held -= sum(map(_size, left.values()))
        for message in left.values():
            self._leave(request, message)
        left.clear()

    def _leave(self, request: ReplayedRequest, message: Outside) -> None:
        """A recorded call is not made, unless it was before its time came."""
        calls = request.outside
        is_made = message.number < calls.asked.get(message.key, 0)
        if not is_made and len(calls.left) < _MAX_TOLD:
            calls.left.append(message.key)

    # --- what handlers ask ----------------------------------------------------------

    async def get(self, event: TrapEvent, key: str, number: int) -> OutsideCall | None:
        """What came of a call then; `None`: it is to be called.

        Raises `OutsideRefusedError` for one that must not be.
        """
        request = self._find(event.seq)
        if request is None:
            self._count(None, key)
            return None
        call = (key, number)
        calls = request.outside
        calls.asked[key] = number + 1
        calls.waiting.add(call)
        try:
            found = await self._reached(request, call)
            if found is not None and found.is_cut_off:
                with anyio.move_on_after(_PATIENCE):
                    await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as cut:
            # It is cut off, in the place of then if it was then.
            at = anyio.current_time()
            await self._walk.hold(request, lambda: call in calls.recorded or request.free)
            found = calls.recorded.get(call)
            # Or it had come by then: a handler begins a little sooner in a replay, and so do its
            # timeouts.
            if found is None:
                self.keep(event, OutsideCall(key, number))
            if found is None or found.is_cut_off or anyio.current_time() > at + _SLACK:
                raise
            if request.cut:
                # By its deadline, of which it heard then when it awaited something else.
                cancel_again(cut)
        finally:
            calls.waiting.discard(call)
            progress = request.progress
            calls.given += 1
            message = calls.recorded.pop(call, None)
            if message is not None:
                self._held -= _size(message)
                if request.keeps:
                    self._keep_recorded(request, message, progress)
            if calls.awaited == call:
                calls.awaited = None
                self._walk.go()
        if found is None or found.is_cut_off or found.left_out:
            calls.made.discard(call)
            if found is not None and found.left_out:
                request.leave_unchecked(_LEFT_OUT)
            self._count(request, key)
            return None
        return OutsideCall(key, number, found.data, found.error, found.types, found.at_once)

    def keep(self, event: TrapEvent, call: OutsideCall) -> None:
        """A function was called: what it came to, and when, is for the recording of new answers.

        It has its place among what else was recorded, since the handler went on then.
        """
        request = self._find(event.seq)
        if request is not None and request.keeps:
            at = 0 if call.at_once else self._walk.time.recorded_now() or 0
            message = Outside(
                event.vm,
                request.event.seq,
                call.key,
                call.number,
                call.data,
                call.error,
                call.types,
                at == 0,
            )
            request.outside.others.append(message)
            if self._walk.journal is not None:
                self._walk.journal.add(request, EventKind.OUTSIDE, at)

    def _keep_recorded(
        self, request: ReplayedRequest, message: Outside, progress: tuple[int, ...]
    ) -> None:
        """A recorded call is made: where the walk came to it, or when more had been done."""
        calls, call = request.outside, (message.key, message.number)
        if calls.read_at.pop(call, None) == progress or message.is_cut_off:
            calls.made.add(call)
            return
        # Its value was there already: nothing of it is waited for.
        calls.others.append(msgspec.structs.replace(message, seq=request.event.seq, at_once=True))
        if self._walk.journal is not None:
            self._walk.journal.add(request, EventKind.OUTSIDE)

    async def _reached(self, request: ReplayedRequest, call: tuple[str, int]) -> Outside | None:
        """What is recorded of a call, when the walk is there; `None`: nothing."""
        recorded = request.outside.recorded
        request.asks_since = self._walk.time.now()
        try:
            while call not in recorded and not request.free:
                gate = request.gate()
                self._walk.go()
                if not gate.is_set():
                    await gate.wait()
        finally:
            request.asks_since = None
        return recorded.get(call)

    def _count(self, request: ReplayedRequest | None, key: str) -> None:
        """There is nothing for a call, and it is made. Raises `OutsideRefusedError`."""
        if self.is_over or (request is not None and request.over and request.reply is None):
            # It may be in what was not read, or was lost; and nothing is compared with it.
            raise OutsideRefusedError(key)
        if self._refuse:
            if request is not None:
                request.differ("outside", NO_CALL, f"{key!a}: {_REFUSED}")
            raise OutsideRefusedError(key)
        if key in self.called or len(self.called) < _MAX_KEYS:
            self.called[key] = self.called.get(key, 0) + 1
        if request is not None and len(request.outside.called) < _MAX_TOLD:
            request.outside.called.append(key)


def _size(message: Outside) -> int:
    """Bytes that a call holds, its own fields included."""
    types = sum(map(len, message.types)) + 64 * len(message.types)
    return 400 + len(message.data or b"") + len(message.error or "") + types
