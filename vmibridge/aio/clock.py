"""The clock of a server, and loops whose time is virtual.

Everything that the engine times, deadlines, results, quotas, durations, is read off one clock:
`loop_clock`. On an ordinary loop that is the monotonic clock of the machine. A replay runs on a
loop with a `VirtualTime`: when nothing can run before the next timer is due, time jumps there. So
an hour that a handler slept takes no time.

| the loop is idle, and | time |
|---|---|
| nothing real is waited for | jumps to the next timer; with a `speed` it takes the N-th part |
| a thread works, or a socket or a pipe is waited for | passes as it does outside |
| the replay reads its file (`held`) | stands still |

Time does not pass while code runs, but for the last bit of it. uvloop has a clock of its own, in C:
no virtual time there.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from sniffio import current_async_library

from vmibridge.aio.virtual_time import VirtualTime

__all__ = ["VirtualTime", "loop_clock", "virtual_loop", "virtual_time"]

_real = time.monotonic


def virtual_time() -> VirtualTime | None:
    """That of the running loop; `None`: its time is real."""
    if current_async_library() == "trio":
        # Where `virtual_loop` has not made a clock, none is asked for: the import takes 80 ms.
        if "vmibridge.aio.clock_trio" not in sys.modules:
            return None
        from vmibridge.aio.clock_trio import trio_time

        return trio_time()
    from vmibridge.aio.clock_asyncio import asyncio_time

    return asyncio_time()


def loop_clock() -> Callable[[], float]:
    """The clock of a server on the running loop: a function that returns seconds."""
    virtual = virtual_time()
    return _real if virtual is None else virtual.read


def virtual_loop(loop: str, virtual: VirtualTime) -> tuple[str, dict[str, Any]]:
    """The backend and its options by which `anyio.run` makes a loop of that time.

    `loop` is `asyncio` or `trio`. Raises `ValueError` for others.
    """
    if loop == "trio":
        from vmibridge.aio.clock_trio import InTurn, TrioClock

        return "trio", {"clock": TrioClock(virtual), "instruments": [InTurn()]}
    if loop != "asyncio":
        raise ValueError(f"{loop} has no virtual time")
    from vmibridge.aio.clock_asyncio import VirtualLoop

    return "asyncio", {"loop_factory": lambda: VirtualLoop(virtual)}
