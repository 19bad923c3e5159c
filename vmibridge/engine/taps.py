"""Taps: what sees the traffic of a server and never steers it. A recorder is one.

A server calls its taps on the event loop, in this order:

| call | when |
|---|---|
| `begin` | for each VM, before its guest runs |
| `trap` | a trap of ours was taken |
| `retried` | right after `trap`: it asks again for what was told to wait |
| `read`, `wrote` | guest memory was accessed for a trap, or could not be |
| `answered` | the answer to a trap was written; every trap has one |
| `end` | for each VM, after its last answer |

A tap that cannot keep up says so by `full`: the server then awaits `room` between an
answer and the next trap of that vCPU, and after an access to memory. So a tap can hold a
guest, but loses nothing and steers nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import Outcome
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["Tap"]


class Tap:
    """Sees what goes on. Its calls return soon and raise nothing."""

    full = False
    """Whether to wait for `room` before more is told."""

    async def room(self) -> None:
        """Wait until `full` is false. Raises nothing; may be cancelled."""

    def begin(
        self, vm: str, bridge: Bridge, settings: ServerSettings, stop: Callable[[Exception], None]
    ) -> None:
        """A VM is about to run. `stop` ends its run, which raises the error."""

    def trap(self, event: TrapEvent) -> None:
        """A trap was taken."""

    def retried(self, event: TrapEvent, first: int) -> None:
        """The trap asks again for what came with trap `first`, a sequence number."""

    def read(
        self, event: TrapEvent, address: int, size: int, data: bytes | None, error: str | None
    ) -> None:
        """`size` bytes were read at a physical address, or could not be: `error` says why."""

    def wrote(self, event: TrapEvent, address: int, data: bytes, error: str | None) -> None:
        """`data` was written to a physical address, or could not be: `error` says why."""

    def answered(self, outcome: Outcome[Any]) -> None:
        """A trap was answered. The outcome has its event."""

    def end(self, vm: str, summary: Summary) -> None:
        """A VM has ended."""


class TappedMemory:
    """Physical memory whose accesses are told to taps."""

    __slots__ = ("_physical", "_taps")

    def __init__(self, physical: PhysicalMemory, taps: Sequence[Tap]) -> None:
        self._physical = physical
        self._taps = taps

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises what the memory behind it raises."""
        try:
            data = await self._physical.read_physical(event, address, size)
        except GuestMemoryError as error:
            for tap in self._taps:
                tap.read(event, address, size, None, error.reason)
            raise
        for tap in self._taps:
            tap.read(event, address, size, data, None)
            if tap.full:
                await tap.room()
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or nothing. Raises what the memory behind it raises."""
        try:
            await self._physical.write_physical(event, address, data)
        except GuestMemoryError as error:
            for tap in self._taps:
                tap.wrote(event, address, data, error.reason)
            raise
        for tap in self._taps:
            tap.wrote(event, address, data, None)
            if tap.full:
                await tap.room()
