"""Blocking calls, each in a thread that no other call can hold.

`to_thread.run_sync` shares 40 threads of the loop, and handlers may fill them: with requests to a
name server, with files of a network that is away. What the server itself has to do would wait for
them, and with it every vCPU: the recorder's chunks, a replay's file, the sockets of a stop. So it
takes no place among the 40. How many threads that makes is bounded by who calls: each has one
call at a time.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

P = TypeVarTuple("P")
R = TypeVar("R")

__all__ = ["in_own_thread"]


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
