"""The signals that end a command.

The first SIGINT or SIGTERM stops in good order, a second one leaves no grace, and a third one ends
the process: a handler may shield itself from being cancelled, but the user has the last word.

A handler may also hold up the event loop, which then receives nothing. So the third one is counted
where Python itself takes signals, between two steps of whatever runs.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import anyio
from anyio.abc import TaskStatus

from vmibridge.cli.stop_bound import StopBound

__all__ = ["STOPS", "exit_status", "hangup_is_ignored", "stop_at_hangup", "stop_on_signals"]

STOPS = (signal.SIGINT, signal.SIGTERM)


async def stop_on_signals(
    stop: Callable[[signal.Signals, bool], None],
    received: list[int],
    also: dict[signal.Signals, Callable[[], None]] | None = None,
    *,
    exits: bool = True,
    bound: StopBound | None = None,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Receive signals until cancelled; `started` when none is missed any more.

    Calls `stop(signal, now)` with each signal that stops, where `now` is true from the second one
    on, and appends its number to `received`. `also` has what other signals do. The third one that
    stops ends the process at once, without any clean-up, unless `exits` is false, for a command
    that would leave a child. The first one begins the time of `bound`.
    """
    others = also or {}
    with (
        anyio.open_signal_receiver(*STOPS, *others) as signals,
        _exiting(at=3 if exits else None, bound=bound),
    ):
        task_status.started()
        async for number in signals:
            if number in others:
                others[number]()
                if received and bound is not None:
                    bound.begin(number)
                continue
            received.append(number)
            stop(number, len(received) > 1)


def stop_at_hangup(
    stop: Callable[[signal.Signals, bool], None], received: list[int]
) -> dict[signal.Signals, Callable[[], None]]:
    """The `also` of a command that has nothing to reload: SIGHUP, as of a terminal that is closed,
    stops it in good order. Where it is ignored, as under `nohup`, it stays so."""

    def hang_up() -> None:
        if not received:
            received.append(signal.SIGHUP)
            stop(signal.SIGHUP, False)

    return {} if hangup_is_ignored() else {signal.SIGHUP: hang_up}


def hangup_is_ignored() -> bool:
    """Whether SIGHUP is ignored, as under `nohup`."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@contextmanager
def _exiting(*, at: int | None, bound: StopBound | None) -> Iterator[None]:
    """End the process with signal number `at` of those that stop, and at the time of `bound`,
    whatever the loop is doing."""
    if at is None:
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    came: list[int] = []

    def count(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if bound is not None:
            bound.begin(signal.Signals(number))
        if len(came) >= at:
            os._exit(128 + number)
        then = before[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    for number in STOPS:
        signal.signal(number, count)
        # As the loops have it: what is called meanwhile goes on.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(received: list[int], *, zero: bool = False) -> int | None:
    """What a command ends with that was stopped by a signal, as a shell says it, or 0 with `zero`;
    `None`: it was not."""
    if not received:
        return None
    return 0 if zero else 128 + received[0]
