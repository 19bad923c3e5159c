"""What a handler runs in: it can be cancelled, once and then for good, and leaves nothing open.

A cancel scope of anyio cancels a task again at each turn of the loop, as long as it runs in the
scope. On asyncio no library expects that: a plain task is cancelled once, and what it awaits on its
way out is awaited to its end (a connection is reset and put back into its pool, a query is
cancelled at its server). So `HandlerScope.cancel` cancels once, and lets the handler unwind for
`patience` seconds. What runs on after that is cancelled at each turn.

On trio each checkpoint in a cancelled scope raises, and libraries of trio expect that: there the
scope is cancelled at once (`handler_scope_trio`).

Theory of operation
===================

There are two scopes, one in the other::

    with outer:            cancelled by `cancel`
        with inner:        a shield from the moment that the task was cancelled by `outer`
            handler

`outer` cancels the task at once, or later, where the handler has a shield of its own, such as
anyio's around a thread. From that moment on `inner` is a shield, which keeps away what `outer`
would do at the next turns, and has a deadline, at which it is cancelled itself.

Both are scopes of anyio, so what they threw in is theirs to catch and to take back
(`Task.uncancel`). When anyio cancels is asked at the one place where it does, a method that is not
public, `CancelScope._deliver_cancellation`. If it had another name some day, a handler would be
cancelled at each turn, as by any scope.

A handler may leave scopes of its own open, as by a generator that it keeps. They would be those of
the task from there on, and their deadline that of whatever it does next. They are cancelled and
closed (`close_left`), which takes two private attributes of anyio, `_task_states` and
`CancelScope._parent_scope`: nothing public tells which scope a task is in.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import anyio
from anyio._backends import _asyncio as anyio_on_asyncio

from vmibridge.aio.generators import OWNER, Generator


class _Outer(anyio_on_asyncio.CancelScope):
    """Calls `on_delivery` when it has cancelled tasks."""

    __slots__ = ("on_delivery",)

    on_delivery: Callable[[], None]
    """Set by whoever cancels it."""

    def _deliver_cancellation(self, origin: anyio_on_asyncio.CancelScope) -> bool:
        again = super()._deliver_cancellation(origin)
        if origin is self:
            self.on_delivery()
        return again


class HandlerScope:
    """See the module. For one `with`; made by `loops.handler_scope`."""

    __slots__ = (
        "_before",
        "_inner",
        "_open",
        "_outer",
        "_patience",
        "_state",
        "begun",
        "left",
        "task",
    )

    def __init__(self, patience: float) -> None:
        self._init()
        self._patience = patience
        self._outer = _Outer()
        self._inner = anyio.CancelScope()
        self._state: Any = None
        self._before = 0
        self._open = False

    def _init(self) -> None:
        self.task: Any = None
        """The task that it was entered in, as the loop has it."""
        # See `generators`.
        self.begun: set[int] = set()
        self.left: list[Generator] = []

    def __enter__(self) -> Self:
        self._outer.__enter__()
        self._inner.__enter__()
        self.task = asyncio.current_task()
        self._state = anyio_on_asyncio._task_states[self.task]
        self._open = True
        OWNER.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._open = False
        self.close_left()
        raised = error
        try:
            if self._inner.__exit__(kind, error, traceback):
                raised = None
        except BaseException as other:  # what is left of a group
            raised = other
        if raised is None:
            self._outer.__exit__(None, None, None)
            return True
        if self._outer.__exit__(type(raised), raised, raised.__traceback__):
            return True
        if raised is error:
            return False
        raise raised

    @property
    def is_current(self) -> bool:
        """Whether this runs in the task of the handler itself."""
        try:
            return asyncio.current_task() is self.task
        except RuntimeError:  # in a thread of the handler
            return False

    @property
    def is_left_open(self) -> bool:
        """Whether the handler, which has ended, has left a cancel scope open."""
        return self._state.cancel_scope is not self._inner

    def close_left(self) -> None:
        """Cancel and close the scopes that the handler has left open."""
        scope = self._state.cancel_scope
        while scope is not None and scope is not self._inner:
            scope = scope._parent_scope
        if scope is None:
            return
        while (left := self._state.cancel_scope) is not self._inner:
            # First the cancellation: it may be the scope of a task group.
            left.cancel()
            left.__exit__(None, None, None)

    def cancel(self) -> None:
        """Cancel what runs in it: once now, and again and again after `patience` seconds."""
        self._before = self.task.cancelling()
        self._outer.on_delivery = self._let_unwind
        self._outer.cancel()

    def _let_unwind(self) -> None:
        if self._open and not self._inner.shield and self.task.cancelling() > self._before:
            self._inner.shield = True
            self._inner.deadline = anyio.current_time() + self._patience
