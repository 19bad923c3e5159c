"""What a handler runs in: it can be cancelled, once and then for good, and leaves nothing open.

A cancel scope of anyio cancels a task again at each turn of the loop, as long as it runs in the
scope. On asyncio no library expects that: a plain task is cancelled once, and what it awaits on its
way out is awaited to its end (a connection is reset and put back into its pool, a query is
cancelled at its server). So `HandlerScope.cancel` cancels once, and lets the handler unwind for
`patience` seconds. What runs on after that is cancelled once more, and lets it unwind again: a
library may have lost the first cancellation, as `asyncio.wait_for` does before Python 3.12 where it
comes together with what is waited for, and then its clean-up is yet to come. What runs on after
another `patience` seconds is cancelled at each turn.

On trio each checkpoint in a cancelled scope raises, and libraries of trio expect that: there the
scope is cancelled at once (`handler_scope_trio`).

Theory of operation
===================

On asyncio it is a scope of anyio, with one difference: when it has cancelled the task, it forgets
that it was cancelled (`_cancel_called`), and so does nothing at the next turns. It is cancelled
again by its deadline, `patience` seconds later. The third time it forgets nothing, and from then on
is what any scope is. It remembers before it is left, so that it takes back what it threw in, and
the cancellations that it asked for (`Task.uncancel`).

A handler with a shield of its own, such as anyio's around a thread, is cancelled when that ends, as
by any scope. What is around the scope cancels as ever: the end of the server does not wait for
`patience`.

A handler may leave scopes of its own open, as by a generator that it keeps. They would be those of
the task from there on, and their deadline that of whatever it does next. They are cancelled and
closed (`close_left`).

This takes what is not public in anyio: `CancelScope` of its asyncio backend with the method
`_deliver_cancellation`, `_cancel_called` and `_parent_scope`, and `_task_states`. A library that
cancels once has no other place to stand; `tests/unit/aio/test_handler_scopes.py` fails if one goes.
"""

import asyncio
from operator import attrgetter
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import anyio
from anyio._backends import _asyncio as anyio_on_asyncio

from vmibridge.aio.generators import LEFT, NONE_BEGUN, NONE_LEFT, OWNERS, Generator, Owner


class HandlerScope(Owner, Protocol):
    """See the module. For one `with`; made by `loops.handler_scope`."""

    task: Any
    """The task that it was entered in, as the loop has it; `None` before, `LEFT` afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None: ...

    holder: Any
    """What of the loop knows the scope that the task is in."""
    mark: object
    """What that is while the handler has none of its own open."""

    current: "ClassVar[attrgetter[object]]"
    """Gets the scope that the task is in from `holder`, in C, since each trap asks for it. Where
    that is not `mark`, the handler has left one open."""

    @property
    def is_left_open(self) -> bool:
        """Whether the handler, which has ended, has left a cancel scope open."""

    def close_left(self) -> None:
        """Cancel and close the scopes that the handler has left open."""

    def rename(self, name: str) -> None:
        """Name the task that it was entered in."""

    def cancel(self) -> None:
        """Cancel what runs in it: now, once more `patience` seconds later, and from twice as many
        seconds later on again and again."""


_APART = 2
"""How many cancellations are single ones."""


class AsyncioHandlerScope(anyio_on_asyncio.CancelScope):
    """A scope on asyncio."""

    __slots__ = ("_before", "_delivered", "_patience", "begun", "holder", "left", "mark", "task")

    others_may_close: ClassVar[bool] = True
    current: "ClassVar[attrgetter[object]]" = attrgetter("cancel_scope")

    def __new__(cls, patience: float) -> Self:  # noqa: ARG004 - that of anyio takes others
        return object.__new__(cls)

    def __init__(self, patience: float) -> None:
        super().__init__()
        self.task: Any = None
        self.begun: dict[int, object] = NONE_BEGUN
        self.left: list[Generator] = NONE_LEFT
        self._patience = patience
        self.holder: Any = None
        self.mark: object = None
        self._before = 0
        self._delivered = 0

    def put_under(self, parent: anyio_on_asyncio.CancelScope) -> None:
        """It will be the outermost scope of a task, and what cancels `parent` cancels that."""
        self._parent_scope = parent

    def begin(self, task: "asyncio.Task[Any]") -> None:
        """Enter it for a task that is new, and so in no scope. The task has to enter it, too."""
        parent = self._parent_scope
        assert parent is not None
        parent._child_scopes.add(self)
        self.task = self._host_task = task
        self._tasks.add(task)
        state = anyio_on_asyncio.TaskState(id(parent._host_task), self)
        self.holder = anyio_on_asyncio._task_states[task] = state
        self.mark = self
        self._active = True

    def __enter__(self) -> Self:
        if self._parent_scope is None:
            super().__enter__()
            self.task = self._host_task
            self.holder = anyio_on_asyncio._task_states[self.task]
            self.mark = self
        elif self.task is None:
            task = asyncio.current_task()
            assert task is not None
            self.begin(task)
        OWNERS[self.task] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self.is_left_open:
            self.close_left()
        if self._delivered:
            self._cancel_called = True
        try:
            return bool(super().__exit__(kind, error, traceback))
        finally:
            OWNERS.pop(self.task, None)
            # Else circles, which only the garbage collector would end.
            self.mark = self.holder = None
            self.task = LEFT

    @property
    def is_left_open(self) -> bool:
        return self.holder.cancel_scope is not self

    def close_left(self) -> None:
        scope = self.holder.cancel_scope
        while scope is not None and scope is not self:
            scope = scope._parent_scope
        if scope is None:
            return
        while (left := self.holder.cancel_scope) is not self:
            # First the cancellation: it may be the scope of a task group.
            left.cancel()
            left.__exit__(None, None, None)

    def rename(self, name: str) -> None:
        self.task.set_name(name)

    def cancel(self, reason: str | None = None) -> None:
        if self._delivered < _APART and self._host_task is not None:
            self._before = self._host_task.cancelling()
        super().cancel(reason)

    def _deliver_cancellation(self, origin: anyio_on_asyncio.CancelScope) -> bool:
        again = super()._deliver_cancellation(origin)
        if origin is not self or self._delivered >= _APART:
            return again
        # It may have been left since the turn of the loop that this was put off to.
        if self._host_task is None or self._host_task.cancelling() <= self._before:
            return again
        self._delivered += 1
        self._cancel_called = False
        if self._cancel_handle is not None:
            self._cancel_handle.cancel()
            self._cancel_handle = None
        self.deadline = anyio.current_time() + self._patience
        return False
