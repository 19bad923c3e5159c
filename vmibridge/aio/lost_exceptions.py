"""What a signal handler raises while uvloop waits: it would be logged, and the loop goes on.

Python runs a signal handler between two steps of whatever runs. While the loop waits, that is in
the loop itself: asyncio and trio end with the exception. uvloop lets `KeyboardInterrupt` and
`SystemExit` through, and hands any other to the exception handler of the loop, as that of its own
callback `Loop._read_from_self`.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sniffio import current_async_library

_WHERE = "Loop._read_from_self"


@contextmanager
def lost_exceptions(take: Callable[[BaseException], None]) -> Iterator[None]:
    """Call `take` with each such exception, in the block; only on uvloop there are any.

    The exception handler that the loop had sees it, too.
    """
    if current_async_library() != "asyncio":
        yield
        return
    loop = asyncio.get_running_loop()
    if not type(loop).__module__.startswith("uvloop"):
        yield
        return
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> object:
        error = context.get("exception")
        if isinstance(error, BaseException) and str(context.get("message")).endswith(_WHERE):
            take(error)
        if before is None:
            loop.default_exception_handler(context)
            return None
        return before(loop, context)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        # One that was set meanwhile stays, and so does this: it hands on to the one before.
        if loop.get_exception_handler() is handle:
            loop.set_exception_handler(before)
