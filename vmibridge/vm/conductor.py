"""Who decides the order in which handlers begin and go on: a backend that plays what was recorded.

A backend with a `Conductor` knows what came after what. The engine asks it before a handler that
was queued begins, and before one that was suspended goes on; it tells of each beginning and end.
The conductor has an `Engine` in turn, by which deadlines pass when they passed then.
"""

from collections.abc import Awaitable
from typing import Protocol

import msgspec

from vmibridge.vm.trap import TrapEvent

__all__ = ["ConductedEngine", "Conductor", "OutsideCall", "with_slack"]


class OutsideCall(msgspec.Struct, frozen=True):
    """What came of one call of `vmi.outside`. Without `data` and `error`: it was cut off."""

    key: str
    number: int
    """Which call of its request it was with that key, from 0."""
    data: bytes | None = None
    """Its value, as MessagePack."""
    error: str | None = None
    """What was raised, as text."""
    types: tuple[str, ...] = ()
    """The names of its class and of those that it derives from."""
    at_once: bool = False
    """Whether the handler did not have to wait for it."""


class ConductedEngine(Protocol):
    """What a conductor may bring about in the engine of its VM."""

    def tell_to_wait(self, first: int) -> bool:
        """The soft deadline of the request that came with trap `first` is now; returns whether it
        has a trap that waits for its handler."""

    def waits_for_retry(self, first: int) -> bool:
        """Whether its handler waits for a retry, to access guest memory."""

    def is_watched(self, first: int) -> bool:
        """Whether its handler runs, or waits to begin."""

    def timeout_of(self, first: int) -> float | None:
        """The seconds of its hard deadline; `None`: its handler neither runs nor waits to begin."""

    def allow(self, first: int, seconds: float) -> None:
        """Its hard deadline is in so many seconds, from now on."""

    def time_out(self, first: int) -> bool:
        """Its hard deadline is now; returns whether its handler runs."""


class Conductor(Protocol):
    """See the module. Called on the event loop; `event` is a trap of the request."""

    seed: int | None
    """Of the random numbers of the handlers; `None`: they get another one."""
    loop: str = ""
    """The event loop that was recorded on, in whose steps handlers go on; empty: not known."""
    plain: TrapEvent | None = None
    """A trap whose handler begins as it likes: the conductor is told that it has begun when it is
    suspended, and not before. Nothing is asked or told of one that never is."""

    def conduct(self, engine: ConductedEngine) -> None:
        """The engine is about to run."""

    def turn(self, event: TrapEvent) -> Awaitable[None] | None:
        """A handler is about to line up, or to begin; what to await first, if anything.

        Asked before both, where it does both.
        """

    def lines_up(self, event: TrapEvent) -> bool:
        """Whether a handler, which nothing of the engine keeps from it, may not begin yet."""

    def began(self, event: TrapEvent) -> None:
        """A handler begins, now."""

    def step(self, event: TrapEvent) -> Awaitable[None] | None:
        """A handler that was suspended is about to go on; what to await first, if anything."""

    def skips(self, event: TrapEvent) -> None:
        """A handler does not make the step that it was about to: it is none on this loop, and the
        next one is asked for."""

    async def outside(self, event: TrapEvent, key: str, number: int) -> OutsideCall | None:
        """A handler calls `vmi.outside`: what came of that then; `None`: it is to be called.

        Raises `OutsideRefusedError` for one that must not be."""

    def called_outside(self, event: TrapEvent, call: OutsideCall) -> None:
        """A function was called that there was nothing for, and came to this."""

    def ended(self, event: TrapEvent) -> None:
        """A handler has ended, now."""

    def postpones(self, first: int) -> float:
        """A deadline has passed of the request that came with trap `first`, and nobody has said
        so. Returns the seconds after which to ask again; 0: it passes now."""

    def retry_of(self, event: TrapEvent) -> int | None:
        """The first trap of the request that this one asks for again; `None`: it asks for none. If
        that is not kept, it is a new request."""

    def wall_time(self, event: TrapEvent) -> int:
        """When the trap was taken: nanoseconds since the Unix epoch."""


def with_slack(seconds: float) -> float:
    """A deadline that passes when it has to: the conductor says when it passes as it did then.

    So what comes close to it is not cut off by a difference of microseconds.
    """
    return seconds * 1.1 + 1.0
