"""A replay on a loop of its own, in a thread of its own, which stands still when it is told to.

Theory of operation
===================

A replay needs virtual time, and the loop of a test has real time. So it runs on another loop, and
whoever plays it, the *caller*, waits for it. One of both runs at a time:

| state | the thread | the caller |
|---|---|---|
| stands still | is blocked in `stand`, inside of a callback of its loop | does what it likes |
| runs | plays on, and asks `is_there` of each request | waits for `notify` |
| over | has ended, with its loop | |

While the thread is blocked nothing on its loop goes on: no handler, no task, no timer. So the
caller may look at handlers and at results without a lock.

`end` ends a replay from either state: it is cancelled, so that handlers unwind and all that is
pending is answered. Then it is over.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from threading import Condition, Event, Thread
from typing import Literal, TypeAlias

import anyio

from vmibridge.aio.clock import VirtualTime, virtual_loop
from vmibridge.aio.loops import Soon, loop_door
from vmibridge.errors import ServerStateError
from vmibridge.recording.replay.request_result import RequestResult

__all__ = ["LoopName", "OwnLoop"]

LoopName: TypeAlias = Literal["asyncio", "trio"]
Test: TypeAlias = Callable[[RequestResult], bool]
Notify: TypeAlias = Callable[[], object]
Begin: TypeAlias = Callable[[Notify], object]


class OwnLoop:
    """See the module. `play` plays: it calls `stand` once it is open, and `hear` for each request.

    `on_end` is called on its loop when it is to end early.
    """

    def __init__(
        self,
        play: Callable[[], Awaitable[None]],
        on_end: Callable[[], object],
        loop: LoopName,
        speed: float,
    ) -> None:
        self.at: RequestResult | None = None
        """The request behind which it stands still."""
        self.is_over: bool = False
        self.error: BaseException | None = None
        """What it ended with."""
        self.raised: BaseException | None = None
        """What the latest `is_there` has raised."""
        self._play = play
        self._on_end = on_end
        self._loop: LoopName = loop
        self._virtual = VirtualTime(speed)
        self._changed = Condition()
        self._is_there: Test | None = None
        """`None`: it stands still."""
        self._waiting: list[Notify] = []
        """Who is notified when it stands still."""
        self._is_ending = False
        self._scope: anyio.CancelScope | None = None
        self._soon: Soon | None = None
        # Without the variables of the caller, one of which says which loop runs.
        self._thread = Thread(
            target=Context().run, args=(self._run,), name="vmibridge replay", daemon=True
        )

    # --- the caller -----------------------------------------------------------------

    def start(self, notify: Notify) -> None:
        """Open it; `notify` is called, in the thread, when it stands still or is over."""
        self._waiting.append(notify)
        self._thread.start()

    def go(self, is_there: Test, notify: Notify) -> None:
        """Play on to the first request for which `is_there` is true, or to the end.

        Raises `ServerStateError` where somebody else waits for it, and when it is over.
        """
        with self._changed:
            if self.is_over or self._is_ending:
                raise ServerStateError("the replay is over: make another for another run")
            if self._waiting:
                raise ServerStateError("the replay is played by another task")
            self.at = self.raised = None
            self._is_there = is_there
            self._waiting.append(notify)
            self._changed.notify()

    def end(self, notify: Notify | None = None) -> None:
        """Have it end soon. `notify` is called then, as for who waits already."""
        with self._changed:
            if self.is_over:
                if notify is not None:
                    notify()
                return
            if notify is not None:
                self._waiting.append(notify)
            self._is_ending = True
            self._changed.notify()
            soon = self._soon
        if soon is not None:
            # Its loop may have closed by now: then it is over, or about to be.
            with suppress(RuntimeError):
                soon(self._cancel)

    async def wait(self, begin: Begin) -> None:
        """Call `start`, `go` or `end`, and wait until it stands still or is over.

        If cancelled, ends it, and waits for that.
        """
        arrived = anyio.Event()
        begin(partial(_post, loop_door(), arrived.set))
        try:
            await arrived.wait()
        except BaseException:  # a cancellation: the thread has to end first
            self.end()
            with anyio.CancelScope(shield=True):
                await arrived.wait()
            raise
        finally:
            self._join()

    def block(self, begin: Begin) -> None:
        """As `wait`, for a caller without an event loop. Ctrl-C ends it."""
        arrived = Event()
        begin(arrived.set)
        try:
            arrived.wait()
        except BaseException:  # Ctrl-C in the main thread: the other one has to end first
            self.end()
            arrived.wait()
            raise
        finally:
            self._join()

    @property
    def is_at_end(self) -> bool:
        """Whether all was played."""
        return self.is_over and not self._is_ending and self.error is None

    def _join(self) -> None:
        if self.is_over:
            self._thread.join()

    # --- the thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            backend, options = virtual_loop(self._loop, self._virtual)
            anyio.run(self._main, backend=backend, backend_options=options)
        except BaseException as error:  # the caller raises it
            self.error = error
        with self._changed:
            self.is_over, self.at = True, None
            self._tell()

    async def _main(self) -> None:
        with anyio.CancelScope() as self._scope:
            with self._changed:
                self._soon = loop_door()
                if self._is_ending:
                    self._scope.cancel()
            await self._play()

    def hear(self, request: RequestResult) -> None:
        """A request is done: stand still, if this is the one."""
        is_there = self._is_there
        if is_there is None or self._is_ending:
            return
        try:
            if not is_there(request):
                return
        except BaseException as error:  # the caller's own
            self.raised = error
        self.stand(request)

    def stand(self, at: RequestResult | None) -> None:
        """Stand still, until the caller says otherwise."""
        with self._changed:
            self._is_there, self.at = None, at
            self._tell()
            self._changed.wait_for(lambda: self._is_ending or self._is_there is not None)
            is_ending = self._is_ending
        if is_ending:
            # At once: what comes next would be played before the loop turns.
            self._cancel()

    def _cancel(self) -> None:
        self._on_end()
        if self._scope is not None:
            self._scope.cancel()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for notify in waiting:
            notify()


def _post(door: Soon, function: Notify) -> None:
    # A loop that is closed has nobody who waits.
    with suppress(RuntimeError):
        door(function)
