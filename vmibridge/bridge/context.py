"""What a handler gets beside the packet: the trap, and the guest's memory.

A request that outlives its soft deadline loses its trap, and gets another one when the
guest sends it again: `event` is then the new one. Its memory waits in between.
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeAlias, TypeVar, overload

import msgspec

from vmibridge.bridge.outside import (
    Fetch,
    check_function,
    check_key,
    fetched,
    in_plain,
    value_of,
)
from vmibridge.vm.memory import GuestMemory, PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["BridgeContext", "Door", "Source"]

T = TypeVar("T")
Door: TypeAlias = Callable[["BridgeContext", str, Fetch], Awaitable[bytes]]
"""Where a call of `vmi.outside` goes that is recorded or replayed; it gives the encoded value."""


class Source(msgspec.Struct, frozen=True):
    """What the times and random numbers of the handlers of one VM come from."""

    epoch: int
    """When the clock of the server was at 0: nanoseconds since the Unix epoch."""
    seed: int
    """Of all requests; each has random numbers of its own."""
    wall_time: Callable[[TrapEvent], int] | None = None
    """Tells when a trap was taken, in a replay."""
    outside: Door | None = None
    """`None`: calls of `vmi.outside` are neither recorded nor replayed."""


class BridgeContext:
    """The guest at one request. It ends with the final answer to it."""

    __slots__ = (
        "_closed",
        "_first",
        "_memory",
        "_outside",
        "_physical",
        "_random",
        "_source",
        "_started",
        "event",
    )

    # Most handlers ask for neither, and then they are never set.
    _first: TrapEvent
    """The trap that the request came with, once it has another one."""
    _random: Random
    _outside: dict[str, int]

    def __init__(
        self,
        event: TrapEvent,
        physical: PhysicalMemory,
        source: "Source | None" = None,
        started: float = 0.0,
    ) -> None:
        self.event: TrapEvent = event
        """The trap; after a soft deadline the one that was answered WAIT, until the retry."""
        self._physical = physical
        self._source = source
        self._started = started
        self._closed = False
        self._memory: GuestMemory | None = None

    @property
    def memory(self) -> GuestMemory:
        """Guest memory by virtual and physical address."""
        if self._memory is None:
            self._memory = GuestMemory(self._physical, self.event)
            if self._closed:
                self._memory.close()
        return self._memory

    @property
    def vm(self) -> str:
        """The name of the VM."""
        return self.event.vm

    @property
    def vcpu(self) -> int:
        """The number of the vCPU, from 0."""
        return self.event.vcpu

    @property
    def time(self) -> int:
        """When the request came: nanoseconds since the Unix epoch.

        The same for as long as it is served, retries included; a replay gives the recorded one.
        """
        source = self._source
        if source is None:
            return round(self._started * 1e9)
        if source.wall_time is not None:
            return source.wall_time(self._came_with)
        return source.epoch + int(self._started * 1e9)

    @property
    def random(self) -> Random:
        """Random numbers of this request alone, which a replay gives again.

        They are no secret: a recording has the seed. For keys use `secrets`.
        """
        if not hasattr(self, "_random"):
            seed = 0 if self._source is None else self._source.seed
            self._random = Random(f"{seed}:{self._came_with.seq}")  # noqa: S311 - said above
        return self._random

    @overload
    async def outside(self, key: str, function: Callable[[], Awaitable[T]]) -> T: ...
    @overload
    async def outside(
        self, key: str, function: Callable[[], Awaitable[object]], *, type: type[T]
    ) -> T: ...
    async def outside(
        self,
        key: str,
        function: Callable[[], Awaitable[object]],
        *,
        type: Any = None,  # noqa: A002 - as msgspec calls it
    ) -> Any:
        """What an async function gets from outside of the host's program: a replay gives the
        recorded value, and does not call it.

        `key` names the call, by 1 to 256 characters; a recording has it as it is. The function
        takes no arguments, and leaves the guest alone. Its value is plain (`None`, bool, int of 64
        bits, float, str, bytes, list, dict), or with `type` whatever msgspec makes of it; it has 8
        MiB at most. It is given as a recording has it, recorded or not: a tuple becomes a list.

        Raises `OutsideError` for whatever `Exception` the function raises, and for a value that
        cannot be recorded; `OutsideRefusedError` in a replay that must not call it; `TypeError`
        and `ValueError` for a wrong key; `TypeError` for what is known not to be an async function
        before it is called. If cancelled, so is the function.
        """
        check_key(key)
        check_function(function)
        door = None if self._source is None else self._source.outside
        if door is None:
            return in_plain(key, await fetched(key, function), type)
        return value_of(key, await door(self, key, function), type)

    def count_outside(self, key: str) -> int:
        """The number of a call with this key, from 0."""
        if not hasattr(self, "_outside"):
            self._outside = {}
        number = self._outside.get(key, 0)
        self._outside[key] = number + 1
        return number

    @property
    def first_seq(self) -> int:
        """The number of the trap that the request came with."""
        return self._came_with.seq

    @property
    def _came_with(self) -> TrapEvent:
        return self._first if hasattr(self, "_first") else self.event

    def park(self) -> None:
        """The guest runs on for now: accesses to its memory wait for `attach`."""
        self.memory.park()

    @property
    def waits_for_retry(self) -> bool:
        """Whether the handler wants guest memory, and the guest runs."""
        return self._memory is not None and self._memory.is_awaited

    def attach(self, event: TrapEvent) -> None:
        """Go on with the trap of a retry."""
        self._first = self._came_with
        self.event = event
        self.memory.attach(event)

    def close(self) -> None:
        """Cut the handler off from the guest, which runs again."""
        # Most handlers never look at memory, and then it is never made.
        self._closed = True
        if self._memory is not None:
            self._memory.close()
