"""What is on the path of every trap, done with each loop's own means.

| here | instead of | why |
|---|---|---|
| `parking` | `Event` | one costs as much as the rest of a task switch |
| `handler_scope` | `CancelScope` | on asyncio a handler is cancelled once, then has to unwind |
| `while_readable` | `receive` | with a checkpoint, a vain try and a new entry in the selector |
"""

import asyncio
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from sniffio import current_async_library

from vmibridge.aio.handler_scope import AsyncioHandlerScope, HandlerScope
from vmibridge.aio.parking import Parking

Soon = Callable[..., Any]
"""Run a function on the loop, soon: `soon(function, *arguments)`, from any thread."""


def loop_door() -> Soon:
    """A way for other threads into the running event loop.

    Both loops raise `RuntimeError` when they are closed by then.
    """
    if current_async_library() == "trio":
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe


def parking() -> Parking:
    """One for the running loop."""
    if current_async_library() == "trio":
        # Only here: trio is an extra.
        from vmibridge.aio.parking_trio import TrioParking

        return TrioParking()
    return Parking()


class _Nothing:
    """Nothing is of this class."""


def sent_error() -> type[object]:
    """What a coroutine is sent where it is to raise an exception, on the running loop.

    Trio sends them, as `outcome.Error`. Asyncio throws them: there it is a class of nothing.
    """
    if current_async_library() == "trio":
        from outcome import Error

        return Error
    return _Nothing


def hears_next() -> Callable[[object], bool]:
    """What tells, on the running loop, whether the step of a suspended coroutine that comes next
    does nothing yet, and the one behind it hears that its task is cancelled."""
    if current_async_library() == "trio":
        from vmibridge.aio.checkpoints_trio import hears_next

        return hears_next
    return lambda _: False


def hears_nothing() -> Callable[[object], bool]:
    """What tells, on the running loop, whether a suspended coroutine cannot be cancelled where it
    is. On asyncio a scope tells."""
    if current_async_library() == "trio":
        from vmibridge.aio.checkpoints_trio import hears_nothing

        return hears_nothing
    return lambda _: False


def tasks_left() -> Callable[[object], bool | None]:
    """What tells, on the running loop, whether a task group has tasks whose end a coroutine waits
    for that is about to go on; `None`: it does not leave one.

    On trio it has none. On asyncio it may have, as the coroutine hears first that the group was
    cancelled, and then waits on.
    """
    if current_async_library() == "trio":
        from vmibridge.aio.checkpoints_trio import tasks_left

        return tasks_left
    from vmibridge.aio.checkpoints_asyncio import tasks_left as tasks_left_on_asyncio

    return tasks_left_on_asyncio


def handler_scopes(patience: float) -> Callable[[], HandlerScope]:
    """What makes them for the running loop.

    On asyncio, who is cancelled has `patience` seconds to unwind.
    """
    if current_async_library() == "trio":
        from vmibridge.aio.handler_scope_trio import TrioHandlerScope

        return TrioHandlerScope
    return partial(AsyncioHandlerScope, patience)


def handler_scope(patience: float) -> HandlerScope:
    """One for the running loop, as `handler_scopes` makes them."""
    return handler_scopes(patience)()


async def while_readable(sock: socket.socket | select.epoll, take: Callable[[], bool]) -> None:
    """Call `take` when there is something to receive, until it returns `False` or raises.

    It receives what there is, without waiting. What it raises is raised here. If cancelled, it
    is not called any more. Close the socket after this has ended, not before.
    """
    if current_async_library() == "trio":
        while True:
            await anyio.wait_readable(sock)
            if not take():
                return
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        try:
            if take():
                return
        except BaseException as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(None)
        loop.remove_reader(sock)

    loop.add_reader(sock, ready)
    try:
        await done
    finally:
        loop.remove_reader(sock)
