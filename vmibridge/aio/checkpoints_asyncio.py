"""Where a task on asyncio waits for others. Imported where asyncio runs."""

from typing import Any, Final

from anyio._backends._asyncio import TaskGroup

from vmibridge.aio.coroutines import awaited_with

_GROUP_ENDS: Final = TaskGroup.__aexit__.__code__


def tasks_have_ended(body: Any) -> bool:
    """Whether a coroutine is suspended at the end of a task group of anyio, whose tasks have ended.
    They are cancelled as it is: as long as there are any, it waits on when it hears of that."""
    end = awaited_with(body, _GROUP_ENDS)
    return end is not None and not end.cr_frame.f_locals["self"]._tasks
