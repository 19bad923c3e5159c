"""Where a task on asyncio waits for others. Imported where asyncio runs.

This takes what is not public in anyio: `TaskGroup` of its asyncio backend, and its `_tasks`;
`tests/unit/aio/test_checkpoints.py` fails if one goes.
"""

from typing import Any, Final

from anyio._backends._asyncio import TaskGroup

from vmibridge.aio.coroutines import awaited_with

_GROUP_ENDS: Final = TaskGroup.__aexit__.__code__


def tasks_left(body: Any) -> bool | None:
    """Whether the task group of anyio has tasks at whose end a coroutine is suspended; `None`: it
    is not. They are cancelled as it is: while there are any, it waits on when it hears of that."""
    end = awaited_with(body, _GROUP_ENDS)
    return None if end is None else bool(end.cr_frame.f_locals["self"]._tasks)
