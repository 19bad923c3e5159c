"""Blocking calls, each in a thread that no other call can hold.

`to_thread.run_sync` shares 40 threads of the loop, and handlers may fill them: with requests to a
name server, with files of a network that is away. What the server itself has to do would wait for
them, and with it every vCPU: the recorder's chunks, a replay's file, the sockets of a stop. So it
takes no place among the 40. How many threads that makes is bounded by who calls: each has one
call at a time.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

from vmibridge.aio.loops import loop_door

P = TypeVarTuple("P")
R = TypeVar("R")

__all__ = ["in_left_thread", "in_own_thread"]


async def in_own_thread(
    function: Callable[[*P], R], *arguments: *P, abandon_on_cancel: bool = False
) -> R:
    """Call `function` in a thread, and wait for it; raises what it raises.

    If cancelled, waits for the end of the call, unless `abandon_on_cancel`.
    """
    return await anyio.to_thread.run_sync(
        function,
        *arguments,
        abandon_on_cancel=abandon_on_cancel,
        limiter=anyio.CapacityLimiter(1),
    )


async def in_left_thread(function: Callable[[], R]) -> R:
    """Call what may take long and changes nothing, such as the question to a name server.

    Raises what it raises. If cancelled, the thread is left behind: neither the loop nor the end of
    the process waits for it, as they do for those of `to_thread` on asyncio.
    """
    ended = anyio.Event()
    found: list[R] = []
    failed: list[BaseException] = []
    soon = loop_door()

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:  # raised where it is awaited
            failed.append(error)
        with suppress(RuntimeError):  # the loop is closed
            soon(ended.set)

    threading.Thread(target=call, name="vmibridge look-up", daemon=True).start()
    await ended.wait()
    for error in failed:
        raise error
    return found[0]
