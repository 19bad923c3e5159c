"""What a handler runs in on trio; see `handler_scope`. Imported where trio runs.

What a handler leaves open is found and closed by three private attributes of trio: those of a
task, `_cancel_status` and `_child_nurseries`, and the scope of a status. A scope that is not
cancelled is entered and left by what trio does for that, without the deadline that it has not, and
the context managers around it: they cost as much again (`CancelStatus`, `_activate_cancel_status`,
`_has_been_entered`). Trio itself takes a task
that ends with an open nursery for a bug, and ends the run with it.
"""

from operator import attrgetter
from types import TracebackType
from typing import Any, ClassVar, Self

import trio
from trio._core._run import CancelStatus
from trio.lowlevel import current_task

from vmibridge.aio.generators import LEFT, NONE_BEGUN, NONE_LEFT, OWNER, Generator


class TrioHandlerScope:
    """A scope on trio: once cancelled, it stays cancelled."""

    __slots__ = ("_scope", "begun", "holder", "left", "mark", "task")

    others_may_close: ClassVar[bool] = False
    current: "ClassVar[attrgetter[object]]" = attrgetter("_cancel_status")

    def __init__(self) -> None:
        self.task: Any = None
        self.begun: dict[int, object] = NONE_BEGUN
        self.left: list[Generator] = NONE_LEFT
        self._scope = trio.CancelScope()
        self.holder: Any = None
        self.mark: Any = None

    def __enter__(self) -> Self:
        scope = self._scope
        self.task = self.holder = task = current_task()
        status = CancelStatus(scope=scope, parent=task._cancel_status)
        self.mark = scope._cancel_status = status
        scope._has_been_entered = True
        task._activate_cancel_status(status)
        OWNER.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.close_left()
        task, status = self.task, self.mark
        # Else circles, which only the garbage collector would end: a task has a context, and that
        # has its owner.
        self.mark = self.holder = None
        self.task = LEFT
        if error is not None or self._scope.cancel_called or task._cancel_status is not status:
            return bool(self._scope.__exit__(kind, error, traceback))
        task._activate_cancel_status(status.parent)
        status.close()
        self._scope._cancel_status = None
        return False

    @property
    def is_current(self) -> bool:
        try:
            return trio.lowlevel.current_task() is self.task
        except RuntimeError:
            return False

    @property
    def is_left_open(self) -> bool:
        return self.task._cancel_status is not self.mark

    def close_left(self) -> None:
        for nursery in self.task.child_nurseries:
            nursery.cancel_scope.cancel()
            self.task._child_nurseries.remove(nursery)
        status = self.task._cancel_status
        while status is not None and status is not self.mark:
            status = status.parent
        if status is None:
            return
        while (status := self.task._cancel_status) is not self.mark:
            status._scope.cancel()
            status._scope.__exit__(None, None, None)

    def rename(self, name: str) -> None:
        self.task.name = name

    def cancel(self) -> None:
        self._scope.cancel()
