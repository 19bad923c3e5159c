"""Where a task on asyncio waits for others. Imported where asyncio runs."""

from typing import Any, Final

from anyio._backends._asyncio import TaskGroup

from vmibridge.aio.coroutines import is_suspended_in

_GROUP_ENDS: Final = TaskGroup.__aexit__.__code__


def waits_for_tasks(body: Any) -> bool:
    """Whether a coroutine waits at the end of a task group of anyio. The tasks in that are
    cancelled as it is, so all that it does when it hears of that is to wait on, if they have not
    ended by then."""
    return is_suspended_in(body, _GROUP_ENDS)
