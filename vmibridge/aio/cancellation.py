"""How errors leave a task group that an object holds open for its user."""

from collections.abc import Awaitable, Callable
from types import TracebackType

__all__ = ["exit_unwrapped"]


async def exit_unwrapped(
    leave: Callable[
        [type[BaseException] | None, BaseException | None, TracebackType | None],
        Awaitable[bool | None],
    ],
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> bool | None:
    """Leave a context that holds a task group, by its `__aexit__`.

    A task group wraps whatever its block raised into a group, also where none of its tasks failed.
    The user of an object that holds a task group does not know of it, and wants to catch the error
    that he raised: so an error that came through alone is raised as it was. A group in which tasks
    failed, too, is raised as a group.
    """
    try:
        return await leave(kind, error, traceback)
    except BaseExceptionGroup as group:
        if group.exceptions == (error,):
            return False
        raise
