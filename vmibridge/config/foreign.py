"""Running code of other people while handlers are loaded, and what is said of what it raises.

It may raise anything, and an exception may raise when it is asked what it is. Each becomes a
`HandlerLoadError` of one line; only Ctrl-C passes.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, TypeVar, cast

from vmibridge.errors import HandlerLoadError
from vmibridge.text import printable, str_of, type_name

__all__ = ["describe", "run"]

R = TypeVar("R")

_OURS = frozenset(
    {"importlib", *(f"vmibridge.config.{name}" for name in ("foreign", "loaded", "sources"))}
)
_LOOPS = frozenset({"anyio", "asyncio", "trio", "uvloop"})
_MAX_TEXT = 1000
"""Characters of a message."""
_RUNS_A_LOOP = (
    "runs an event loop while it is imported; put that behind"
    " if __name__ == '__main__':, or into __aenter__ of a handler"
)


def run(code: Callable[[], R], source: str, file: Path | None = None) -> R:
    """What `code` returns. Raises `HandlerLoadError` for whatever it raises.

    The message names the file and line, for which `file` is where the code of `source` is.
    """
    try:
        with _without_loop():
            return code()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise HandlerLoadError(_place(error, source, file)) from error


def describe(error: BaseException) -> str:
    """The type of an error and what it says, in one line of printable text."""
    if isinstance(error, RuntimeError) and _comes_of_a_loop(error):
        return _RUNS_A_LOOP
    lines = [printable(line.strip()) for line in str_of(error).splitlines() if line.strip()]
    kind = printable(type_name(error))
    return f"{kind}: {' '.join(lines)}"[:_MAX_TEXT] if lines else kind


class _NoLoop:
    """Stands for the loop of a thread that has none."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("there is no running event loop while handlers are loaded")


@contextmanager
def _without_loop() -> Iterator[None]:
    """Let asyncio, and what is built on it, refuse to run a loop.

    A module that runs one as it is imported would hold up the start for as long as that takes,
    and could not be reloaded, since then a loop is running: so it is refused from the first.
    """
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 - what asyncio.run asks
        yield
        return
    asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", _NoLoop()))  # noqa: SLF001
    try:
        yield
    finally:
        asyncio._set_running_loop(None)  # noqa: SLF001


def _comes_of_a_loop(error: RuntimeError) -> bool:
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    text = str_of(error)
    refused = any(word in text for word in ("running", "inside a run")) and any(
        str(frame.f_globals.get("__name__")).partition(".")[0] in _LOOPS for frame in frames[-2:]
    )
    raised: BaseException | None = error if refused else None
    while raised is not None:
        _close_coroutines(raised)
        raised = raised.__context__
    return refused


def _close_coroutines(error: BaseException) -> None:
    # Else Python would warn of those that never ran, in lines of its own.
    for frame, _ in walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if inspect.iscoroutine(value) and inspect.getcoroutinestate(value) == "CORO_CREATED":
                value.close()


def _place(error: BaseException, source: str, file: Path | None) -> str:
    """`FILE:LINE: what happened`, with the innermost line that is the user's, where it is known."""
    if isinstance(error, SyntaxError) and isinstance(error.lineno, int):
        where = _named(str_of(error.filename), source, file)
        return f"{where}:{error.lineno}: {type_name(error)}: {printable(str_of(error.msg))}"
    found = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if not _is_of_the_import(frame)
    ]
    if file is not None:
        own = [each for each in found if Path(each[0]).is_relative_to(file.parent)]
        chosen = own[-1:]
    else:
        chosen = found[:1]
    if not chosen:
        return f"{source}: {describe(error)}"
    name, line = chosen[0]
    return f"{_named(name, source, file)}:{line}: {describe(error)}"


def _is_of_the_import(frame: FrameType) -> bool:
    """Whether it is no code of the user's, but that which imports it."""
    module = frame.f_globals.get("__name__")
    return module in _OURS or frame.f_code.co_filename.startswith("<frozen")


def _named(name: str, source: str, file: Path | None) -> str:
    """The file of an error, as the user calls it where it is the source itself."""
    return source if file is not None and name == str(file) else printable(name)
