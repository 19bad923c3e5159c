"""Async generators that a handler leaves in their middle are closed in its own task.

`async for row in rows(): return row` is ordinary code. Python then hands the generator to the loop,
which closes it later, in a task of its own. A cancel scope, a task group or a timer that the
generator holds would be entered in the one task and left in the other, which anyio refuses with an
error, trio with the end of the run, and asyncio not at all.

- The hooks of Python for async generators (`sys.set_asyncgen_hooks`) are set once a loop, in front
  of those of the loop, which takes them away with its own when it ends.
- A generator is that of a handler when its first step was in the handler's own task, until the
  handler has ended. A task that the handler started has its generators closed by the loop, as ever.
- One that the handler keeps is not touched: only when nothing refers to it any more does Python
  call the hook.
- A handler may leave a generator and then wait for what the generator holds: a cursor that streams
  holds the lock of its connection, and the connection is committed on the way out. Its own task
  cannot close the generator then. On asyncio, where locks belong to no task, the loop does at its
  next turn, as in a plain task; but not if the generator has opened a cancel scope or a task group,
  which only its own task can leave. On trio locks belong to tasks, too.
"""

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable
from operator import attrgetter
from typing import Any, ClassVar, Final, Protocol, TypeAlias

import anyio
from sniffio import current_async_library

log: logging.Logger = logging.getLogger(__name__)

Generator: TypeAlias = AsyncGenerator[Any, Any]


class Owner(Protocol):
    """What a handler runs in, as far as generators go."""

    begun: dict[int, object]
    """Those that had their first step, with the scope that the task was in then. By their ids; in
    CPython an id is free only after the hook."""
    left: list[Generator]
    """Those to close."""
    others_may_close: ClassVar[bool]
    """Whether another task can give back what a generator holds, but for scopes."""
    current: "ClassVar[attrgetter[object]]"
    """Gets the scope that the task is in from `holder`."""
    holder: Any


LEFT: Final = object()
"""In place of the task of an owner that was left, and is not to be entered again."""
NONE_BEGUN: Final[dict[int, object]] = {}
NONE_LEFT: Final[list[Generator]] = []
"""What an owner has before the first generator: most handlers have none."""
OWNERS: Final[dict[object, Owner]] = {}
"""By the task of the handler, as its loop has it, from where that is entered to where it is left. A
context variable would be one for the tasks that the handler starts, too, and two objects for each
handler that waits."""


class _Hooks:
    """Those of one loop."""

    def __init__(self) -> None:
        self._loop = sys.get_asyncgen_hooks()
        self._current_task: Callable[[], object] = asyncio.current_task
        if current_async_library() == "trio":
            import trio

            self._current_task = trio.lowlevel.current_task

    def _owner(self) -> Owner | None:
        """That of the task that this runs in."""
        try:
            return OWNERS.get(self._current_task())
        except RuntimeError:  # in a thread of the handler, or no task
            return None

    def begin(self, generator: Generator) -> None:
        """A generator has its first step."""
        owner = self._owner()
        if owner is not None:
            if not owner.begun:
                # It may still be `NONE_BEGUN`, which is that of all.
                owner.begun, owner.left = {}, []
            owner.begun[id(generator)] = owner.current(owner.holder)
        if self._loop.firstiter is not None:
            self._loop.firstiter(generator)

    def leave(self, generator: Generator) -> None:
        """A generator is in its middle, and nothing refers to it any more."""
        owner = self._owner()
        if owner is not None and id(generator) in owner.begun:
            owner.left.append(generator)
            # Where the scope is not the same, the generator may have opened it.
            same_scope = owner.current(owner.holder) is owner.begun[id(generator)]
            if same_scope and owner.others_may_close:
                asyncio.get_running_loop().call_soon(self._hand_on, owner, generator)
        elif self._loop.finalizer is not None:
            self._loop.finalizer(generator)

    def _hand_on(self, owner: Owner, generator: Generator) -> None:
        """The loop turns. A handler that has ended has its generators closed, so one that is still
        there is that of a handler which waits."""
        if generator in owner.left and self._loop.finalizer is not None:
            owner.left.remove(generator)
            self._loop.finalizer(generator)


def watch_generators() -> None:
    """Set the hooks of the running loop, unless they are set."""
    hooks = sys.get_asyncgen_hooks()
    if not isinstance(getattr(hooks.finalizer, "__self__", None), _Hooks):
        ours = _Hooks()
        sys.set_asyncgen_hooks(firstiter=ours.begin, finalizer=ours.leave)


async def close_generators(owner: Owner, name: str) -> None:
    """Close what the handler `name` has left, the latest first; does not raise."""
    # Taken out together: while one is closed, the loop is handed none of the others.
    taken, owner.left = owner.left, []
    while taken:
        try:
            await taken.pop().aclose()
        except anyio.get_cancelled_exc_class():
            # The canceller has answered for it.
            log.debug("handler %s was cancelled while its generators were closed", name)
        except BaseException as error:  # a generator may raise anything
            if not _is_exit(error):
                log.exception(
                    "handler %s left an async generator, which raised when it was closed",
                    name,
                )
        # Its own clean-up may have left others.
        taken += owner.left
        owner.left.clear()
    owner.begun.clear()


def _is_exit(error: BaseException) -> bool:
    # What closes a generator is an exception, and a task group in it makes a group of that.
    return isinstance(error, BaseExceptionGroup) and error.split(GeneratorExit)[1] is None
