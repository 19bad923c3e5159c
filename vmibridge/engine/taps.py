"""Taps: what sees the traffic of a server and never steers it. A recorder is one.

A server calls its taps on the event loop, in this order:

| call | when |
|---|---|
| `begin` | for each VM, before its guest runs |
| `trap` | a trap of ours was taken |
| `retried` | right after `trap`: it asks again for what was told to wait |
| `read`, `wrote` | guest memory was accessed for a trap, or could not be |
| `answered` | the answer to a trap was written; every trap has one |
| `blocked` | a handler held up the event loop for long, which turns again |
| `end` | for each VM, after its last answer |

A tap that cannot keep up says so by `full`: the server then awaits `room` between an
answer and the next trap of that vCPU, and after an access to memory. So a tap can hold a
guest, but loses nothing and steers nothing.

A tap that raises in any of these is *dropped* (`Taps`): the log has one line, `dropped` is
called, and every trap goes on. To end a run on purpose, a tap does not raise: it calls the `stop`
that `begin` gave it. So does a recorder whose file cannot be written, and a replay that can
compare no more.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from vmibridge.bridge.dispatch import Bridge, one_line
from vmibridge.bridge.outcome import Outcome
from vmibridge.engine.loop_watch import Blocked
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["Tap"]

log: logging.Logger = logging.getLogger(__name__)


class Tap:
    """Sees what goes on. Its calls return soon. If one raises, the tap is dropped."""

    full = False
    """Whether to wait for `room` before more is told."""

    async def room(self) -> None:
        """Wait until `full` is false. May be cancelled."""

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

    def blocked(self, blocked: Blocked) -> None:
        """A handler held up the event loop: which, where, and for how long."""

    def end(self, vm: str, summary: Summary) -> None:
        """A VM has ended."""

    def dropped(self, vm: str, error: Exception) -> None:
        """A call raised `error`, and this one is the last for that VM.

        A tap that must not be missed calls the `stop` that it was given.
        """


class Taps:
    """The taps of one VM. One that raises is dropped, and everything goes on without it.

    Dropped means: it gets no further call for this VM but `dropped`, nobody waits for its `room`
    any more, and the log has one line. What else it sees, such as of other VMs, stays as it was.
    """

    def __init__(self, vm: str, taps: Sequence[Tap]) -> None:
        self._vm = vm
        # Replaced and not changed when one goes: it happens while they are being called.
        self._taps = tuple(taps)
        self._waits: dict[anyio.CancelScope, Tap] = {}

    def begin(
        self, bridge: Bridge, settings: ServerSettings, stop: Callable[[Exception], None]
    ) -> None:
        """The VM is about to run."""
        for tap in self._taps:
            try:
                tap.begin(self._vm, bridge, settings, stop)
            except Exception as error:
                self._drop(tap, "begin", error)

    def trap(self, event: TrapEvent) -> None:
        """A trap was taken."""
        for tap in self._taps:
            try:
                tap.trap(event)
            except Exception as error:
                self._drop(tap, "trap", error)

    def retried(self, event: TrapEvent, first: int) -> None:
        """The trap asks again for what came with trap `first`."""
        for tap in self._taps:
            try:
                tap.retried(event, first)
            except Exception as error:
                self._drop(tap, "retried", error)

    def read(
        self, event: TrapEvent, address: int, size: int, data: bytes | None, error: str | None
    ) -> bool:
        """Memory was read, or could not be. Returns whether to wait for `room`."""
        full = False
        for tap in self._taps:
            try:
                tap.read(event, address, size, data, error)
                full = full or tap.full
            except Exception as raised:
                self._drop(tap, "read", raised)
        return full

    def wrote(self, event: TrapEvent, address: int, data: bytes, error: str | None) -> bool:
        """Memory was written, or could not be. Returns whether to wait for `room`."""
        full = False
        for tap in self._taps:
            try:
                tap.wrote(event, address, data, error)
                full = full or tap.full
            except Exception as raised:
                self._drop(tap, "wrote", raised)
        return full

    def answered(self, outcome: Outcome[Any]) -> bool:
        """A trap was answered. Returns whether to wait for `room`."""
        full = False
        for tap in self._taps:
            try:
                tap.answered(outcome)
                full = full or tap.full
            except Exception as error:
                self._drop(tap, "answered", error)
        return full

    async def room(self) -> None:
        """Wait until no tap is full. Cancelled, it stops waiting."""
        for tap in self._taps:
            try:
                await self._room_of(tap)
            except Exception as error:
                self._drop(tap, "room", error)

    async def _room_of(self, tap: Tap) -> None:
        with anyio.CancelScope() as scope:
            self._waits[scope] = tap
            try:
                # Dropped while another one was waited for, it might never have room.
                if self._has(tap) and tap.full:
                    await tap.room()
            finally:
                del self._waits[scope]

    def blocked(self, blocked: Blocked) -> None:
        """A handler has held up the loop."""
        for tap in self._taps:
            try:
                tap.blocked(blocked)
            except Exception as error:
                self._drop(tap, "blocked", error)

    def end(self, summary: Summary) -> None:
        """The VM has ended."""
        for tap in self._taps:
            try:
                tap.end(self._vm, summary)
            except Exception as error:
                self._drop(tap, "end", error)

    def _has(self, tap: Tap) -> bool:
        # By identity: a tap may say anything about being equal.
        return any(each is tap for each in self._taps)

    def _drop(self, tap: Tap, call: str, error: Exception) -> None:
        if not self._has(tap):
            # By two calls at a time, such as two that waited for its room.
            return
        self._taps = tuple(each for each in self._taps if each is not tap)
        name = type(tap).__name__
        told = one_line(error)
        log.error("vm %s: tap %s is dropped: its %s() raised %s", self._vm, name, call, told)
        log.debug("how tap %s raised", name, exc_info=error)
        # Whoever waits for its room holds a vCPU, and it may have been about to make some.
        for scope, awaited in self._waits.items():
            if awaited is tap:
                scope.cancel()
        try:
            tap.dropped(self._vm, error)
        except Exception:  # dropped is dropped: it has no further call to be dropped from
            log.debug("tap %s raised when it was dropped", name, exc_info=True)


class TappedMemory:
    """Physical memory whose accesses are told to taps."""

    __slots__ = ("_physical", "_taps")

    def __init__(self, physical: PhysicalMemory, taps: Taps) -> None:
        self._physical = physical
        self._taps = taps

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises what the memory behind it raises."""
        try:
            data = await self._physical.read_physical(event, address, size)
        except GuestMemoryError as error:
            self._taps.read(event, address, size, None, error.reason)
            raise
        if self._taps.read(event, address, size, data, None):
            await self._taps.room()
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or nothing. Raises what the memory behind it raises."""
        try:
            await self._physical.write_physical(event, address, data)
        except GuestMemoryError as error:
            self._taps.wrote(event, address, data, error.reason)
            raise
        if self._taps.wrote(event, address, data, None):
            await self._taps.room()
