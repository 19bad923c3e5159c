"""Run a coroutine as far as it goes without waiting, and the rest of it later.

Most backends answer a trap without waiting. To await that through a generator, in a context of
its own, as handlers are run (`vmibridge.aio.coroutines`), would cost more than the answer.
"""

from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Final

DONE: Final = object()


def first_step(body: Coroutine[Any, Any, None]) -> object:
    """Run `body` until it waits; returns what for, or `DONE`. Raises what it raises."""
    try:
        return body.send(None)
    except StopIteration:
        return DONE


@coroutine
def go_on(body: Coroutine[Any, Any, None], wish: object) -> Generator[object, Any, None]:
    """Await the rest of `body`, in the same task."""
    while True:
        try:
            reply = yield wish
        except BaseException as error:
            step: Callable[[Any], object] = body.throw
            reply = error
        else:
            step = body.send
        try:
            wish = step(reply)
        except StopIteration:
            return
