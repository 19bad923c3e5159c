"""What is seen, and conducted, of a handler: when it is queued, begins, goes on and ends.

Only with a tap that wants to know, or a backend that conducts (`vm.conductor`): `HandlerCalls` pays
one test otherwise.

A *step* is what a handler does from one suspension to the next. An access to guest memory that is
waited for does not count: a VM answers at once or later, and a recording has the access itself.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from types import coroutine
from typing import Any

from vmibridge.aio.coroutines import watched_rest
from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Answer, Entry, ask
from vmibridge.engine.queue_time import Began
from vmibridge.engine.request import Worker, first_trap
from vmibridge.engine.taps import Step, Taps
from vmibridge.vm.conductor import Conductor

__all__ = ["HandlerWatch", "source_for", "watch_for"]

_SEED = 48
"""Bits."""


def watch_for(
    taps: Taps | None, began: Began | None, conductor: Conductor | None
) -> "HandlerWatch | None":
    """What watches the handlers of a VM; `None`: nobody wants to know."""
    if taps is None or (began, taps.handler_stepped, conductor) == (None, None, None):
        return None
    return HandlerWatch(began, conductor, taps)


def source_for(conductor: Conductor | None, clock: Callable[[], float]) -> Source:
    """What the times and random numbers of handlers of a VM come from."""
    if conductor is None:
        return Source(time.time_ns() - round(clock() * 1e9), secrets.randbits(_SEED))
    seed = secrets.randbits(_SEED) if conductor.seed is None else conductor.seed
    return Source(0, seed, conductor.wall_time)


class HandlerWatch:
    """See the module."""

    def __init__(self, began: Began | None, conductor: Conductor | None, taps: Taps) -> None:
        self._began = began
        self._stepped = taps.handler_stepped
        self._conductor = conductor
        self._taps = taps
        self.lined_up: set[Worker] = set()
        """Who waits to begin; whoever ends its request takes it out."""

    def queued(self, worker: Worker) -> None:
        """A handler lines up."""
        if worker not in self.lined_up:
            self.lined_up.add(worker)
            self._tell(worker, "queued")

    def turn(self, worker: Worker) -> Awaitable[None] | None:
        """A handler is about to line up, or to begin; what to await first, if anything."""
        conductor = self._conductor
        return None if conductor is None else conductor.turn(worker.context.event)

    def lines_up(self, worker: Worker) -> bool:
        """Whether a handler that could begin has to line up: it holds no place till it begins."""
        conductor = self._conductor
        return conductor is not None and conductor.lines_up(worker.context.event)

    @coroutine
    def ask(self, worker: Worker, entry: Entry) -> Generator[Any, Any, Answer]:
        """Ask a handler, and watch it."""
        conductor = self._conductor
        if conductor is not None:
            turn = conductor.turn(worker.context.event)
            if turn is not None:
                yield from turn.__await__()
                if worker.request.is_overtaken:
                    return None
            conductor.began(worker.context.event)
        if self._began is not None:
            self._began(worker, entry)
        # Most begin with their trap, and that costs nothing.
        if self.lined_up and worker in self.lined_up:
            self.lined_up.discard(worker)
            self._tell(worker, "began")
        body = _coroutine(ask(entry, worker.context, worker.request.packet))
        # As `_make` does, without its call.
        self._taps.stepping = True
        try:
            wish = body.send(None)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        else:
            self._taps.stepping = False
            try:
                if conductor is None:
                    rest = watched_rest(body, wish, partial(self._step, worker))
                else:
                    rest = self._conducted(worker, body, wish, conductor)
                last: Answer = yield from rest
                return last
            finally:
                self._tell(worker, "ended")
        finally:
            self._taps.stepping = False
            if conductor is not None:
                conductor.ended(worker.context.event)

    def _is_step(self, worker: Worker) -> bool:
        return worker.context.event.seq not in self._taps.reading

    def _step(
        self, worker: Worker, step: Callable[[Any], object], reply: object, is_thrown: bool
    ) -> object:
        if self._is_step(worker):
            self._tell(worker, "thrown" if is_thrown else "resumed")
        return self._make(step, reply)

    def _make(self, step: Callable[[Any], object], reply: object) -> object:
        # Memory that the handler itself accesses is told from that of tasks beside it.
        taps = self._taps
        taps.stepping = True
        try:
            return step(reply)
        finally:
            taps.stepping = False

    def _tell(self, worker: Worker, step: Step) -> None:
        if self._stepped is not None:
            self._stepped(worker.context.event, first_trap(worker.request, worker), step)

    def _conducted(
        self, worker: Worker, body: Any, wish: object, conductor: Conductor
    ) -> Generator[Any, Any, Answer]:
        """The rest of a handler, each step in its turn."""
        while True:
            try:
                reply: Any = yield wish
                step = body.send
            except GeneratorExit:
                body.close()
                raise
            except BaseException as error:  # all that is thrown in is the handler's to catch
                step, reply = body.throw, error
            if self._is_step(worker):
                turn = conductor.step(worker.context.event)
                if turn is not None:
                    try:
                        yield from turn.__await__()
                    except BaseException as error:  # the same
                        step, reply = body.throw, error
                self._tell(worker, "thrown" if step == body.throw else "resumed")
            try:
                wish = self._make(step, reply)
            except StopIteration as end:
                answer: Answer = end.value
                return answer


def _coroutine(what: Any) -> Any:
    return what if isinstance(what, Coroutine) else _awaiting(what)


async def _awaiting(what: Any) -> Any:
    # A handler may be a function that returns something to be awaited.
    return await what
