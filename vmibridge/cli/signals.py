"""The signals that end a command.

The first SIGINT or SIGTERM stops in good order, a second one leaves no grace, and a third one ends
the process: a handler may shield itself from being cancelled, but the user has the last word.
"""

import os
import signal
from collections.abc import Callable

import anyio
from anyio.abc import TaskStatus

__all__ = ["STOPS", "exit_status", "stop_on_signals"]

STOPS = (signal.SIGINT, signal.SIGTERM)


async def stop_on_signals(
    stop: Callable[[signal.Signals, bool], None],
    received: list[int],
    also: dict[signal.Signals, Callable[[], None]] | None = None,
    *,
    exits: bool = True,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Receive signals until cancelled; `started` when none is missed any more.

    Calls `stop(signal, now)` with each signal that stops, where `now` is true from the second one
    on, and appends its number to `received`. `also` has what other signals do. The third one that
    stops ends the process at once, without any clean-up, unless `exits` is false, for a command
    that would leave a child.
    """
    others = also or {}
    with anyio.open_signal_receiver(*STOPS, *others) as signals:
        task_status.started()
        async for number in signals:
            if number in others:
                others[number]()
                continue
            received.append(number)
            if exits and len(received) > 2:
                os._exit(128 + number)
            stop(number, len(received) > 1)


def exit_status(received: list[int]) -> int | None:
    """What a command ends with that was stopped by a signal, as a shell says it; else None."""
    return 128 + received[0] if received else None
