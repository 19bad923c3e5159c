"""What is seen, and conducted, of a handler: when it is queued, begins, goes on and ends.

Only with a tap that wants to know, or a backend that conducts (`vm.conductor`): `HandlerCalls` pays
one test otherwise.

A *step* is what a handler does from one suspension to the next. An access to guest memory that is
waited for does not count: a VM answers at once or later, and a recording has the access itself.
Nor does what a handler waits for inside of `vmi.outside`: a replay does not call that function. A
handler that was cut off hears of it in one step, which takes two on trio (`hears_next`).

That a task group is cancelled which it is about to leave, a handler hears on asyncio in a step of
its own, and then waits for the tasks. On trio it goes on when they have ended (`tasks_left`). So on
trio that step of a recording is none; on asyncio it is none where trio has recorded, and where the
tasks have ended by then it is heard of in the next one.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from types import coroutine
from typing import Any

import anyio
from sniffio import current_async_library

from vmibridge.aio.coroutines import watched_rest
from vmibridge.aio.loops import hears_next, hears_nothing, sent_error, tasks_left
from vmibridge.bridge.context import BridgeContext, Door, Source
from vmibridge.bridge.dispatch import Answer, Entry, ask
from vmibridge.engine.queue_time import Began
from vmibridge.engine.request import Worker, first_trap
from vmibridge.engine.taps import Step
from vmibridge.engine.vm_taps import Taps
from vmibridge.vm.conductor import Conductor

__all__ = ["HandlerWatch", "as_coroutine", "source_for", "watch_for"]

_SEED = 48
"""Bits."""


def watch_for(
    taps: Taps | None, began: Began | None, conductor: Conductor | None
) -> "HandlerWatch | None":
    """What watches the handlers of a VM; `None`: nobody wants to know."""
    if taps is None or (began, taps.handler_stepped, conductor) == (None, None, None):
        return None
    return HandlerWatch(began, conductor, taps)


def source_for(
    conductor: Conductor | None, clock: Callable[[], float], outside: Door | None
) -> Source:
    """What the times and random numbers of handlers of a VM come from."""
    if conductor is None:
        epoch = time.time_ns() - round(clock() * 1e9)
        return Source(epoch, secrets.randbits(_SEED), outside=outside)
    seed = secrets.randbits(_SEED) if conductor.seed is None else conductor.seed
    return Source(0, seed, conductor.wall_time, outside)


class HandlerWatch:
    """See the module."""

    def __init__(self, began: Began | None, conductor: Conductor | None, taps: Taps) -> None:
        self._began = began
        self._stepped = taps.handler_stepped
        self._conductor = conductor
        self.taps: Taps = taps
        """Those of the VM."""
        self.is_quiet: bool = conductor is None and began is None
        """Whether nobody wants to know of a handler before it is suspended, unless it has lined up:
        its first step may be made without `ask`, and the rest by `rest_of`."""
        self.order: Conductor | None = conductor if began is None else None
        """The same holds for its plain trap."""
        self.lined_up: set[Worker] = set()
        """Who waits to begin; whoever ends its request takes it out."""
        self._is_on_trio = current_async_library() == "trio"
        self._sent_error = sent_error()
        self._hears_next = hears_next()
        self._hears_nothing = hears_nothing()
        self._tasks_left = tasks_left()
        self._cancelled = anyio.get_cancelled_exc_class()
        self.suspensions: int = 0
        """How often any of them was suspended, or has ended after it was."""
        self.outside: set[BridgeContext] = set()
        """Those that are inside of `vmi.outside`, other than in a task that they have started."""

    @property
    def stepping(self) -> BridgeContext | None:
        """Whose handler runs right now, other than in a task that it has started."""
        return self.taps.stepping

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
        body = as_coroutine(ask(entry, worker.context, worker.request.packet))
        # As `_run` does, without its call.
        self.taps.stepping = worker.context
        try:
            wish = body.send(None)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        else:
            return (yield from self._rest(worker, body, wish))
        finally:
            self.taps.stepping = None
            if conductor is not None:
                conductor.ended(worker.context.event)

    @coroutine
    def rest_of(self, worker: Worker, body: Any, wish: object) -> Generator[Any, Any, Answer]:
        """The rest of a handler whose first step was made without `ask`, and which waits for
        `wish`."""
        conductor = self._conductor
        if conductor is not None:
            conductor.began(worker.context.event)
        try:
            return (yield from self._rest(worker, body, wish))
        finally:
            if conductor is not None:
                conductor.ended(worker.context.event)

    def _rest(self, worker: Worker, body: Any, wish: object) -> Generator[Any, Any, Answer]:
        conductor = self._conductor
        self.taps.stepping = None
        self.suspensions += 1
        try:
            if conductor is None:
                rest = watched_rest(body, wish, partial(self._step, worker, body))
            else:
                rest = self._conducted(worker, body, wish, conductor)
            last: Answer = yield from rest
            return last
        finally:
            self._tell(worker, "ended")

    def _is_step(self, worker: Worker, body: Any) -> bool:
        context = worker.context
        if context in self.taps.reading or context in self.outside:
            return False
        return not (worker.request.is_overtaken and self._hears_next(body))

    def _is_cancelled(self, worker: Worker, sent: object) -> bool:
        """Whether what a handler is sent is that it is cut off. On trio each sleep ends with a
        cancellation, so one that comes before that says nothing."""
        return worker.request.is_overtaken and isinstance(sent, self._sent_error)

    def _step(
        self, worker: Worker, body: Any, step: Callable[..., object], *arguments: object
    ) -> object:
        if arguments and self._is_step(worker, body):
            is_thrown = step == body.throw or self._is_cancelled(worker, arguments[0])
            self._tell(worker, "thrown" if is_thrown else "resumed")
        return self._run(worker, step, *arguments)

    def _run(self, worker: Worker, step: Callable[..., object], *arguments: object) -> object:
        self.taps.stepping = worker.context
        try:
            return step(*arguments)
        finally:
            self.taps.stepping = None
            self.suspensions += 1

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
            # On trio it does not hear that the group is cancelled whose tasks it waits for.
            if conductor.loop == "trio" and self._tasks_left(body):
                self._tell(worker, "thrown")
            elif self._is_step(worker, body):
                has_heard = False
                while (turn := conductor.step(worker.context.event)) is not None:
                    try:
                        yield from turn.__await__()
                    except BaseException as error:  # the same
                        is_cancelled = isinstance(error, self._cancelled)
                        if is_cancelled and self._tasks_left(body) is False:
                            # It heard of that then, and of their end in a further step.
                            if self._is_on_trio or has_heard:
                                conductor.skips(worker.context.event)
                            else:
                                self._tell(worker, "thrown")
                            has_heard = True
                            continue
                        if not (is_cancelled and self._hears_nothing(body)):
                            step, reply = body.throw, error
                    break
                is_thrown = step == body.throw or self._is_cancelled(worker, reply)
                self._tell(worker, "thrown" if is_thrown and not has_heard else "resumed")
            try:
                wish = self._run(worker, step, reply)
            except StopIteration as end:
                answer: Answer = end.value
                return answer


def as_coroutine(what: Any) -> Any:
    """What a handler has returned, to be stepped."""
    return what if isinstance(what, Coroutine) else _awaiting(what)


async def _awaiting(what: Any) -> Any:
    # A handler may be a function that returns something to be awaited.
    return await what
