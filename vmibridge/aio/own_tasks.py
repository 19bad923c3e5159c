"""Tasks that cost little: one for each request that waits.

`start_soon` of anyio makes six objects and a second coroutine for each task: a handle that can be
awaited and cancelled, which nothing here asks for. It costs more than all the rest of the way of a
trap. So a task is made by the loop itself, and is still one of the task group:

- The group does not end before its tasks (`_hold`).
- What cancels the group cancels them, by their scopes, which are children of that of the group. A
  task is in its `HandlerScope` from the start, so it has one scope and not three.
- What one of them raises ends the group, and comes out of it.

On trio a nursery does all of this, and the group of anyio has one (`start_trio`).

This takes what is not public in anyio: see `handler_scope`, and the nursery of a task group.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
from anyio._backends import _asyncio as anyio_on_asyncio
from anyio.abc import TaskGroup

from vmibridge.aio.handler_scope import AsyncioHandlerScope


class OwnTasks:
    """See the module. Those of asyncio, in one task group, which does not end before `close`."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group
        scope: Any = group.cancel_scope
        self._scope: anyio_on_asyncio.CancelScope = scope
        self._loop = asyncio.get_running_loop()
        # The loop has weak references only.
        self._running: set[asyncio.Task[None]] = set()
        # Once for all: each would have its own, and a copy of its context.
        self._on_end = self._ended
        self._context = copy_context()
        self._is_held = self._is_closed = False
        self._change: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def start(self, scope: AsyncioHandlerScope, body: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task that runs `body`, which has to enter `scope` and to leave it.

        The group must not have ended.
        """
        if not self._is_held:
            self._is_held = True
            self._group.start_soon(self._hold)
        scope.put_under(self._scope)
        task = self._loop.create_task(body, name=name)
        # An eager task has begun by now.
        if scope.task is None:
            scope.begin(task)
        self._running.add(task)
        task.add_done_callback(self._on_end, context=self._context)

    def close(self) -> None:
        """Let the group end when the tasks have. One that is started later holds it again."""
        self._is_closed = True
        self._wake()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        state = anyio_on_asyncio._task_states.pop(task, None)
        if state is not None and state.cancel_scope is not None:
            state.cancel_scope._tasks.discard(task)
        if task.cancelled():
            # As any task of a group: if not by its group, it was by what ends the program.
            self._scope.cancel()
        elif (error := task.exception()) is not None:
            self._error = error if self._error is None else self._error
            self._scope.cancel()
        if self._is_closed and not self._running:
            self._wake()

    def _wake(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    async def _hold(self) -> None:
        """One task of the group, as long as there are tasks or may be some."""
        try:
            # They are cancelled with the group, and may take their time.
            with anyio.CancelScope(shield=True):
                while self._running or not self._is_closed:
                    self._change = self._loop.create_future()
                    try:
                        await self._change
                    except asyncio.CancelledError:
                        self._scope.cancel()
        finally:
            self._is_held = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def own_tasks(group: TaskGroup) -> OwnTasks | None:
    """Those of a group, which has to be entered; `None` on trio."""
    return OwnTasks(group) if isinstance(group, anyio_on_asyncio.TaskGroup) else None


def starter(
    group: TaskGroup, function: Callable[[], Coroutine[Any, Any, None]]
) -> Callable[[], object]:
    """What starts a task that runs `function` in a group, which has to be entered.

    It returns nothing of that.
    """
    nursery = getattr(group, "_nursery", None)
    if nursery is None:
        return partial(group.start_soon, function)
    # Only here: trio is an extra.
    from vmibridge.aio.start_trio import trio_starter

    return trio_starter(nursery, function)
