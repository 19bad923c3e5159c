"""Taps: what sees the traffic of a server and never steers it. A recorder is one.

A server calls its taps on the event loop, in this order:

| call | when |
|---|---|
| `begin` | for each VM, before its guest runs |
| `trap` | a trap of ours was taken |
| `retried` | right after `trap`: it is a retry of a request that got WAIT |
| `read`, `wrote` | guest memory was accessed for a trap, or could not be |
| `answered` | the answer to a trap was written; every trap has one |
| `end` | for each VM, after its last answer |

Besides, there are *hooks*, for what counts and times. A tap that does not define one costs nothing
for it, nor does a server without taps: which taps define which hook is worked out once, when the
run is made, and what only a hook needs, such as the time in the queue, is not measured without.

| hook | when |
|---|---|
| `machine` | right before `begin`: the architecture of the VM |
| `source` | right before `begin`: what times and random numbers of handlers come from |
| `handler_began` | a handler is called, right before it is; after `trap`, before `answered` |
| `taken_at` | right before each `trap`: when it was taken |
| `handler_stepped` | a handler is queued, begins, goes on after it was suspended, or ends |
| `ran_natively` | a trap that is not ours was let go: it has none of the calls above |
| `session_event` | between `begin` and `end`: the agent of a remote VM has come, or is lost |
| `handlers_reloaded` | other handlers are asked from here on |
| `blocked` | a handler held up the event loop for long, which turns again |
| `tap_lost` | another tap was dropped |
| `unrecorded` | the VM has ended, after `end`: how many of its traps the tap could not keep |
| `missed_traps` | this tap was dropped, and the VM has ended: in the place of `end` |

What belongs together: a *trap* is its VM and `TrapEvent.seq`. A *request* is its VM and the
sequence number of the trap that it came with: `HandlerBegan.first`, and of an outcome
`Outcome.retry_of` or, where that is `None`, the number of its own trap.

A tap that cannot keep up says so by `full`: the server then awaits `room` between an
answer and the next trap of that vCPU, and after an access to memory. So a tap can hold a
guest, but loses nothing and steers nothing.

A tap that raises in any of these is *dropped* (`Taps`): the log has one line, `dropped` is
called, and every trap goes on. To end a run on purpose, a tap does not raise: it calls the `stop`
that `begin` gave it. So does a recorder whose file cannot be written, and a replay that can
compare no more. What it cannot do for now, it says by `hindrance`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import msgspec

from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import NativeReason
from vmibridge.engine.loop_watch import Blocked
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.backend import SessionEvent
from vmibridge.vm.conductor import OutsideCall
from vmibridge.vm.trap import TrapEvent

__all__ = ["HandlerBegan", "Hindrance", "NativeReason", "Step", "Tap"]

Step: TypeAlias = Literal["queued", "began", "resumed", "thrown", "ended", "parked", "cut off"]
"""What a handler does, or what is done to it; see `Tap.handler_stepped`."""
Stepped: TypeAlias = Callable[[TrapEvent, int, Step], None]


class HandlerBegan(msgspec.Struct, frozen=True):
    """A handler is about to be called. Times are of the monotonic clock."""

    event: TrapEvent
    """The trap; after a soft deadline the one that was answered WAIT, until the retry."""
    first: int
    """The sequence number of the trap that the request came with: all of its traps, and all
    handlers that are asked for it, have it in common."""
    packet: BridgePacket
    """What the guest asks."""
    handler: str
    """The name of the handler, as in `Outcome.handler`."""
    method: str | None
    """The name of its method; `None` for a handler without methods, or a code that it does not
    know."""
    queued: int | None
    """Nanoseconds from when the trap was put into the queue until a worker took it. Given once
    for a trap: `None` for a handler that a request was passed on to by another one."""
    waited: int
    """Nanoseconds since the trap was taken: for the turn of a serial handler, for a place, and for
    handlers that passed the request on. It is in `Outcome.duration`, `queued` is not."""


class Hindrance(msgspec.Struct, frozen=True):
    """Why a tap does not do its work right now, for whoever asks whether a server is ready."""

    kind: Literal["disk full", "not recording"]
    """`disk full` ends by itself when there is room again; `not recording` stays."""
    why: str
    """One line: the file, and what the system says."""
    holds_guests: bool
    """Whether the guests wait for it."""


class Tap:
    """Sees what goes on. Its calls return soon. If one raises, the tap is dropped."""

    full = False
    """Whether to wait for `room` before the next call."""
    hindrance: Hindrance | None = None
    """What keeps it from its work right now; `None`: nothing."""

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

    def end(self, vm: str, summary: Summary) -> None:
        """A VM has ended."""

    def dropped(self, vm: str, error: Exception) -> None:
        """A call raised `error`, and this one is the last for that VM, but for `missed_traps`.

        What is no `Exception` is named by a `RuntimeError`. A tap that must not be missed calls
        the `stop` that it was given.
        """

    # --- hooks: without a definition in a subclass they are not called ----------------

    def source(self, vm: str, source: Source) -> None:
        """What the times and random numbers of its handlers come from: `begin` follows."""

    def taken_at(self, started: float) -> None:
        """When the trap was taken that `trap` follows with, in seconds of the server's clock."""

    def handler_stepped(self, event: TrapEvent, first: int, step: Step) -> None:
        """A handler of the request that came with trap `first` is queued, begins, goes on after it
        was suspended, or ends after it was; or its soft deadline has passed, and it is parked, or
        its hard one, and it is cut off. `event` is the trap that it has, or had last."""

    def outside_called(self, event: TrapEvent, first: int, call: OutsideCall) -> None:
        """`vmi.outside` has given a value to a handler of the request that came with trap `first`,
        or has failed, or was cut off. `event` as above. The next call is after `room`, where the
        tap is full."""

    def machine(self, vm: str, architecture: Architecture[Any]) -> None:
        """What a VM is that is about to run: `begin` follows."""

    def blocked(self, blocked: Blocked) -> None:
        """A handler held up the event loop: which, where, and for how long."""

    def handler_began(self, began: HandlerBegan) -> None:
        """A handler is about to be called."""

    def ran_natively(self, event: TrapEvent, why: NativeReason) -> None:
        """A trap that is not ours ran natively. One that the policy denies is ours: `answered`
        is called for it, whatever its guest gets."""

    def session_event(self, event: SessionEvent) -> None:
        """The session of a remote VM has changed.

        After handlers were reloaded, the taps of the new ones are called, from the next change on.
        """

    def handlers_reloaded(self, vm: str, bridge: Bridge, settings: ServerSettings) -> None:
        """Each trap that is taken from here on is asked of `bridge`; what was begun stays."""

    def tap_lost(self, vm: str, tap: "Tap", error: Exception) -> None:
        """Another tap of the VM raised `error`, and was dropped."""

    def unrecorded(self, vm: str) -> int:
        """How many traps of the VM this tap could not keep, such as for a disk that was full; they
        are `Summary.unrecorded`."""
        return 0

    def missed_traps(self, vm: str, count: int) -> None:
        """This tap was dropped, and the VM has ended: `count` traps were taken without it, the one
        included that its own `trap` raised at."""


def hindrance_of(taps: Iterable[object]) -> Hindrance | None:
    """The worst of theirs: one that holds guests, then one that stays."""
    found = [each for tap in taps if (each := getattr(tap, "hindrance", None)) is not None]
    return min(
        found, key=lambda each: (not each.holds_guests, each.kind == "disk full"), default=None
    )
