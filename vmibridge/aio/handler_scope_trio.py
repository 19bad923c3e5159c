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
from typing import Any, ClassVar, Final, Self

from trio import CancelScope
from trio._core._run import CancelStatus
from trio.lowlevel import current_task

from vmibridge.aio.generators import LEFT, NONE_BEGUN, NONE_LEFT, OWNERS, Generator

_MAX_UNUSED = 1024
_UNUSED: Final[list[CancelStatus]] = []
"""Those of scopes that were left as they were entered, each with its scope: to make both costs as
much as to enter and to leave them. What was cancelled, or has anything under it, is not among them.
"""


class TrioHandlerScope:
    """A scope on trio: once cancelled, it stays cancelled."""

    __slots__ = ("begun", "holder", "left", "mark", "task")

    others_may_close: ClassVar[bool] = False
    current: "ClassVar[attrgetter[object]]" = attrgetter("_cancel_status")

    def __init__(self) -> None:
        self.task: Any = None
        self.begun: dict[int, object] = NONE_BEGUN
        self.left: list[Generator] = NONE_LEFT
        self.holder: Any = None
        self.mark: Any = None

    def __enter__(self) -> Self:
        self.task = self.holder = task = current_task()
        status: Any = _UNUSED.pop() if _UNUSED else CancelStatus(scope=CancelScope(), parent=None)
        status._scope._has_been_entered = True
        status._scope._cancel_status = self.mark = status
        parent = task._cancel_status
        if parent.effectively_cancelled:
            status.parent = parent
        else:
            # As the setter, which looks whether a deadline has passed, too.
            status._parent = parent
            parent._children.add(status)
        task._activate_cancel_status(status)
        OWNERS[task] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        task, status = self.task, self.mark
        if task._child_nurseries or task._cancel_status is not status:
            self.close_left()
        OWNERS.pop(task, None)
        # Else circles, which only the garbage collector would end.
        self.mark = self.holder = None
        self.task = LEFT
        scope = status._scope
        if error is not None or scope._cancel_called or task._cancel_status is not status:
            return bool(scope.__exit__(kind, error, traceback))
        parent = status._parent
        task._activate_cancel_status(parent)
        scope._cancel_status = None
        if status._tasks or status._children or status.effectively_cancelled:
            status.close()
            return False
        # As `close` does where nothing is under it.
        status._parent = None
        parent._children.remove(status)
        if len(_UNUSED) < _MAX_UNUSED:
            _UNUSED.append(status)
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
        # Once it was left, its status may be that of another.
        if self.mark is not None:
            self.mark._scope.cancel()
