"""How errors leave a task group that an object holds open for its user."""

from contextlib import AsyncExitStack
from types import TracebackType

__all__ = ["UnwrappedExit"]


class UnwrappedExit:
    """The `__aexit__` of an object whose `__aenter__` puts a task group into `_stack`.

    A task group wraps whatever its block raised into a group, also where none of its tasks failed.
    The user of an object that holds a task group does not know of it, and wants to catch the error
    that he raised: so an error that came through alone is raised as it was. A group in which tasks
    failed, too, is raised as a group.
    """

    _stack: AsyncExitStack

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._stack.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:  # of a task group: a cancellation may be in it
            if group.exceptions == (error,):
                return False
            raise
