"""Reports a handler that holds up the event loop, while it does.

A handler that blocks, or computes for long, stops every trap and every deadline of the server, and
nothing on the loop can say so. A thread of its own can: it looks at the stack of the loop's thread.

Theory of operation
===================

| the thread sees | it |
|---|---|
| no handler on the stack | does nothing; a loop that is idle is never woken |
| a handler on the stack | posts a *mark* to the loop, once |
| the mark has run | forgets it: the loop has turned since |
| the mark waits, another request is on the stack | counts from now, for that one |
| the mark waits, for `after` seconds by now | reports it, and again after twice that time |

Nothing is done for this on the path of a trap. Which handler it is stands in the frame of
`HandlerCalls.ask`, which is on the stack whenever a handler runs: in the task of a worker or in its
own. What a handler blocks in another task that it started has no such frame, and is not seen.

Invariants
----------

- The thread touches nothing of the engine but what it reads from that frame. It logs; everything
  else, such as the summary and the taps, gets it from the mark, on the loop, when that turns again.
- The thread ends with the block, and does not keep the process alive.
- No garbage is collected while it looks at the stack: see `_no_collection`.
"""

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, get_ident
from types import CodeType, FrameType
from typing import Final, NamedTuple, Self

from vmibridge.aio.loops import Soon, loop_door
from vmibridge.bridge.dispatch import place_in
from vmibridge.engine.request import Request

log: logging.Logger = logging.getLogger(__name__)

_LOOKS_AT_ONCE: Final = Lock()
"""The collector is that of the process: one watch would turn it on while another looks."""
_LOOKS = 4
"""Looks at the stack in the time after which a handler is reported."""


class Blocked(NamedTuple):
    """A handler that holds up the event loop, or did."""

    vm: str
    handler: str
    method: int
    place: str
    """`FILE:LINE`, where it was seen."""
    seconds: float
    """For how long, up to now."""


class _Seen(NamedTuple):
    """What is on the stack."""

    request: Request
    started: float
    """When its trap was taken: a worker has the same request for one trap after the other."""
    place: str
    vm: str
    tell: Callable[[Blocked], None]

    def blocked(self, seconds: float) -> Blocked:
        entry, packet = self.request.entry, self.request.packet
        return Blocked(self.vm, entry.name, packet.method, self.place, seconds)


class _Mark:
    """Posted to the loop; it runs when the loop turns."""

    def __init__(self, seen: _Seen) -> None:
        self.seen = seen
        self.since = time.monotonic()
        self.report_at = 0.0
        self.looks = 0
        self.reported = False
        self.has_run = False

    def run(self) -> None:
        """On the loop."""
        self.has_run = True
        if self.reported:
            blocked = self.seen.blocked(time.monotonic() - self.since)
            log.warning(
                "vm %s: handler %s has let go of the event loop after %.1f s",
                blocked.vm,
                blocked.handler,
                blocked.seconds,
            )
            self.seen.tell(blocked)


class LoopWatch:
    """See the module. For a block on the loop; `after` seconds may be infinite: then it is idle."""

    def __init__(self, after: float, asks: CodeType) -> None:
        self._after = after
        self._asks = asks
        self._over = Event()
        self._mark: _Mark | None = None
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        # The longest that a thread can wait for is a few hundred years; infinity raises.
        if self._after < 1e6:
            self._thread = Thread(
                target=self._watch,
                args=(get_ident(), loop_door()),
                name="vmibridge loop watch",
                daemon=True,
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, thread: int, soon: Soon) -> None:
        while not self._over.wait(self._after / _LOOKS):
            with _no_collection():
                seen = _handler_in(thread, self._asks)
            try:
                self._look(seen, soon)
            except RuntimeError:
                # The loop is closed.
                return
            finally:
                # It holds what the handler was asked.
                del seen

    def _look(self, seen: _Seen | None, soon: Soon) -> None:
        mark = self._mark
        if mark is not None and mark.has_run:
            mark = self._mark = None
        if seen is None:
            return
        if mark is None:
            mark = self._mark = _Mark(seen)
            mark.report_at = mark.since + self._after
            soon(mark.run)
            return
        mark.looks += 1
        if mark.seen[:2] != seen[:2]:
            if not mark.reported:
                mark.seen, mark.since = seen, time.monotonic()
                mark.report_at = mark.since + self._after
            mark.looks = 0
        elif (now := time.monotonic()) >= mark.report_at and (
            # Else the process itself stood still for a while.
            mark.looks >= _LOOKS - 1
        ):
            mark.seen, mark.reported = seen, True
            mark.report_at = now + (now - mark.since)
            _log(seen.blocked(now - mark.since))


def _log(blocked: Blocked) -> None:
    log.warning(
        "vm %s: handler %s holds up the event loop, and with it every trap: method %#06x, at %s,"
        " for %.1f s so far",
        blocked.vm,
        blocked.handler,
        blocked.method,
        blocked.place,
        blocked.seconds,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected in the block.

    Before Python 3.12 a collection begins wherever an object is made, such as that of a frame that
    is asked for. The clean-up that it runs may let the loop's thread go on, and the frame that was
    being asked for is gone: that crashed the process.
    """
    with _LOOKS_AT_ONCE:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _handler_in(thread: int, asks: CodeType) -> _Seen | None:
    """The handler on the stack of a thread."""
    above: list[tuple[str, int]] = []
    step: FrameType | None = sys._current_frames().get(thread)  # noqa: SLF001 - the documented way
    while step is not None:
        if step.f_code is asks:
            names = step.f_locals
            place = place_in(reversed(above))
            # Between two handlers of a request none runs.
            if place is None or "entry" not in names:
                return None
            calls = names["self"]
            request = names["request"]
            return _Seen(request, request.started, place, calls.vm, calls.on_blocked)
        # There is no line between two of them.
        above.append((step.f_code.co_filename, step.f_lineno or step.f_code.co_firstlineno))
        step = step.f_back
    return None
