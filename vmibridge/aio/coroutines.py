"""Run a coroutine inside another: as far as it goes without waiting, then the rest of it.

- What never waits costs no task and no task switch: most handlers, most answers of backends.
- What the event loop sends or throws while the body waits goes to the body unchanged,
  cancellation included.

`run_inline` gives the body a copy of the context, so that context variables that a handler sets
never reach the next trap. `first_step` and `go_on` leave it in the caller's: answers and messages
set none, and a copy would cost more than they do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from operator import call
from types import CodeType, coroutine
from typing import Any, Final, TypeVar

R = TypeVar("R")

DONE: Final = object()
"""What `first_step` returns of a body that has ended."""


def awaited_with(body: Any, code: CodeType) -> Any:
    """What runs this code: a suspended coroutine, or the outermost one that it awaits; `None`:
    none of them."""
    while body is not None and getattr(body, "cr_code", None) is not code:
        body = getattr(body, "cr_await", None)
    return body


def _rest(
    body: Coroutine[Any, Any, Any], wish: object, run: Callable[..., object]
) -> Generator[object, Any, Any]:
    """Pass on what the loop and a suspended body say to each other; returns the body's result.

    `wish` is what the body waits for now; `run` calls each step, with its argument, in the context
    that the steps are to have. A `yield from` would run them all in that of the task.
    """
    while True:
        try:
            reply = yield wish
        except BaseException as error:  # all that is thrown in is the body's to catch
            step: Callable[[Any], object] = body.throw
            reply = error
        else:
            step = body.send
        try:
            wish = run(step, reply)
        except StopIteration as end:
            return end.value


class _Suspended(Generator[object, Any, Any]):
    """The rest of a suspended body, as `_rest` does it, each step in `context`.

    It shows the body where tools look for what a task waits for (`cr_frame`, `cr_await`): trio's
    `iter_await_frames`, call graphs of asyncio. A generator that steps a body ends their chain.
    """

    __slots__ = ("_body", "_run", "_wish")

    def __init__(self, body: Coroutine[Any, Any, Any], wish: object, context: Context) -> None:
        self._body = body
        self._run = context.run
        self._wish: object = wish

    # Each coroutine object has these two; the protocol of `typing` leaves them out.
    @property
    def cr_frame(self) -> Any:
        return self._body.cr_frame  # type: ignore[attr-defined]

    @property
    def cr_await(self) -> Any:
        return self._body.cr_await  # type: ignore[attr-defined]

    def __next__(self) -> object:
        # The first one is what the body waits for by now; that may be `None`.
        wish, self._wish = self._wish, DONE
        return self._run(self._body.send, None) if wish is DONE else wish

    def send(self, value: object) -> object:
        return self._run(self._body.send, value)

    def throw(self, error: Any, *_: Any) -> object:
        return self._run(self._body.throw, error)

    def close(self) -> None:
        self._run(self._body.close)


# `coroutine` marks the function itself and returns it: the same object, with the type of something
# that is awaited.
_rest_to_await: Callable[..., Awaitable[None]] = coroutine(_rest)


@coroutine
def run_inline(body: Coroutine[Any, Any, R], on_wait: Callable[[], None]) -> Generator[Any, Any, R]:
    """Await `body` in a copy of the context; call `on_wait` once, right before it first waits.

    Raises what `body` raises.
    """
    context = copy_context()
    try:
        wish = context.run(body.send, None)
    except StopIteration as end:
        result: R = end.value
        return result
    on_wait()
    result = yield from _Suspended(body, wish, context)
    return result


def first_step(body: Coroutine[Any, Any, None]) -> object:
    """Run `body` until it waits; returns what for, or `DONE`. Raises what it raises.

    The wish has to be passed to `go_on`, or `body.close()` called.
    """
    try:
        return body.send(None)
    except StopIteration:
        return DONE


def go_on(body: Coroutine[Any, Any, None], wish: object) -> Awaitable[None]:
    """The rest of `body`, to be awaited once, in the task and context of the caller.

    `wish` is what `first_step` returned.
    """
    return _rest_to_await(body, wish, call)


def asyncio_task() -> "asyncio.Task[object] | None":
    """The task that this runs in, where the loop is asyncio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def cancel_again(cut: BaseException) -> None:
    """What this task does not take for a cancellation is one when it awaits something next.

    On trio it is so by itself.
    """
    task = asyncio_task()
    if task is not None:
        task.uncancel()
        task.cancel(*cut.args)


async def forget_cancellation(task: "asyncio.Task[object]") -> None:
    """Take back what a handler did that cancelled the task it was run in."""
    while task.cancelling():
        task.uncancel()
    # What is not delivered yet.
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


class _Watched(_Suspended):
    """The same in the caller's context, each step by `run`."""

    __slots__ = ()

    def __init__(
        self, body: Coroutine[Any, Any, Any], wish: object, run: Callable[..., object]
    ) -> None:
        self._body = body
        self._run: Callable[..., Any] = run
        self._wish = wish


def watched_rest(
    body: Coroutine[Any, Any, R], wish: object, run: Callable[..., object]
) -> Generator[Any, Any, R]:
    """The rest of a suspended body, which waits for `wish`. `run` makes each step: it gets
    `send`, `throw` or `close` of the body, and the argument for it.

    Raises what `body` raises.
    """
    return _Watched(body, wish, run)
