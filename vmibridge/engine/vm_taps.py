"""The taps of one VM: each call to all of them, and what becomes of one that raises.

Which taps define which hook is worked out once, when the run is made (`taps`).
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio

from vmibridge.aio.coroutines import asyncio_task
from vmibridge.bridge.context import BridgeContext, Source
from vmibridge.bridge.dispatch import Bridge, one_line
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.request import why_native
from vmibridge.engine.interruptions import is_being_cancelled
from vmibridge.engine.loop_watch import Blocked
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import HandlerBegan, Stepped, Tap
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.backend import SessionEvent
from vmibridge.vm.conductor import OutsideCall
from vmibridge.vm.trap import TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

_HOOKS = (
    "machine",
    "source",
    "handler_began",
    "handler_stepped",
    "outside_called",
    "taken_at",
    "ran_natively",
    "session_event",
    "handlers_reloaded",
    "blocked",
    "tap_lost",
    "unrecorded",
)


class Taps:
    """The taps of one VM. One that raises is dropped, and everything goes on without it: whatever
    it raises, since its calls await nothing and a cancellation is none of the loop's.

    Dropped means: it gets no further call for this VM but `dropped` and `missed_traps`, no lane
    waits for its `room` any more, and the log has one line. What else it sees, such as of other
    VMs, stays as it was.
    """

    def __init__(self, vm: str, traps: TrapFilter, taps: Sequence[Tap]) -> None:
        self._vm = vm
        self._filter = traps
        # Replaced and not changed when one goes: it happens while they are being called.
        self._taps = tuple(taps)
        self._hooks = {name: _callees(self._taps, name) for name in _HOOKS}
        self._waits: dict[anyio.CancelScope, Tap] = {}
        self._losses: list[tuple[Tap, Exception]] = []
        self._dropped: list[tuple[Tap, int]] = []
        """With how much of `_missed` is not its own."""
        self._cancelled = anyio.get_cancelled_exc_class()
        self._lets_go = False
        self._missed = 0
        """Traps that were taken since the first tap was dropped."""
        # None where no tap has the hook: the caller then pays one test.
        self.handler_began: Callable[[HandlerBegan], None] | None = self._hook("handler_began")
        self.handler_stepped: Stepped | None = self._hook("handler_stepped")
        self.stepping: BridgeContext | None = None
        """Whose handler makes a step right now; `None` in a task beside it."""
        self.reading: set[BridgeContext] = set()
        """Those whose handlers wait for guest memory, in their own task."""
        self.session_event: Callable[[SessionEvent], None] | None = self._hook("session_event")
        self.handlers_reloaded: Callable[..., None] | None = self._hook("handlers_reloaded")
        self.ran_natively: Callable[[TrapEvent], None] | None = (
            self._call_native if self._hooks["ran_natively"] else None
        )

    def _hook(self, name: str) -> Callable[..., None] | None:
        return partial(self._call, name) if self._hooks[name] else None

    def _call(self, hook: str, *arguments: object) -> None:
        for tap, call in self._hooks[hook]:
            try:
                call(*arguments)
            except BaseException as error:
                self._drop(tap, hook, error)
        if self._losses:
            self._report_losses()

    def _call_each(self, name: str, *arguments: object) -> None:
        for tap in self._taps:
            try:
                getattr(tap, name)(*arguments)
            except BaseException as error:
                self._drop(tap, name, error)
        if self._losses:
            self._report_losses()

    def _call_native(self, event: TrapEvent) -> None:
        """A trap that is not ours ran natively."""
        self._call("ran_natively", event, why_native(event, self._filter))

    def begin(
        self,
        bridge: Bridge,
        settings: ServerSettings,
        stop: Callable[[Exception], None],
        architecture: Architecture[Any],
        source: Source,
    ) -> None:
        """The VM is about to run."""
        self._call("machine", self._vm, architecture)
        self._call("source", self._vm, source)
        self._call_each("begin", self._vm, bridge, settings, stop)

    def trap(self, event: TrapEvent, started: float) -> None:
        """A trap was taken at `started`, in seconds of the server's clock."""
        if self._dropped:
            self._missed += 1
        for tap, taken_at in self._hooks["taken_at"]:
            try:
                taken_at(started)
            except BaseException as error:
                self._drop(tap, "taken_at", error)
        for tap in self._taps:
            try:
                tap.trap(event)
            except BaseException as error:
                self._drop(tap, "trap", error)
        if self._losses:
            self._report_losses()

    def retried(self, event: TrapEvent, first: int) -> None:
        """The trap asks again for what came with trap `first`."""
        self._call_each("retried", event, first)

    def read(
        self, event: TrapEvent, address: int, size: int, data: bytes | None, error: str | None
    ) -> bool:
        """Memory was read, or could not be. Returns whether to wait for `room`."""
        return self._told(self._taps, "read", event, address, size, data, error)

    def wrote(self, event: TrapEvent, address: int, data: bytes, error: str | None) -> bool:
        """Memory was written, or could not be. Returns whether to wait for `room`."""
        return self._told(self._taps, "wrote", event, address, data, error)

    def _told(self, taps: Sequence[Tap], name: str, *arguments: object) -> bool:
        full = False
        for tap in taps:
            try:
                getattr(tap, name)(*arguments)
                full = bool(tap.full) or full
            except BaseException as raised:
                self._drop(tap, name, raised)
        if self._losses:
            self._report_losses()
        return full

    @property
    def hears_outside(self) -> bool:
        """Whether a tap wants to know of `vmi.outside`."""
        return bool(self._hooks["outside_called"])

    def outside_called(self, event: TrapEvent, first: int, call: OutsideCall) -> bool:
        """`vmi.outside` has come to something. Returns whether to wait for `room`."""
        taps = [tap for tap, _ in self._hooks["outside_called"]]
        return self._told(taps, "outside_called", event, first, call)

    def answered(self, outcome: Outcome[Any]) -> bool:
        """A trap was answered. Returns whether to wait for `room`."""
        full = False
        for tap in self._taps:
            try:
                tap.answered(outcome)
                full = bool(tap.full) or full
            except BaseException as error:
                self._drop(tap, "answered", error)
        if self._losses:
            self._report_losses()
        return full

    async def room(self) -> None:
        """Wait until no tap is full. If cancelled, stops waiting."""
        for tap in self._taps:
            try:
                await self._room_of(tap)
            except self._cancelled as cut:
                # Its own is neither that of a scope nor that of the task: it awaits what was
                # cancelled, and would again.
                task = asyncio_task()
                if task is None or task.cancelling() or is_being_cancelled():
                    raise
                self._drop(tap, "room", cut)
                self._report_losses()
            except BaseException as error:
                self._drop(tap, "room", error)
                self._report_losses()

    def let_go(self) -> None:
        """The run ends: nothing waits for a tap any more, which may have no room for hours."""
        self._lets_go = True
        for scope in self._waits:
            scope.cancel()

    async def _room_of(self, tap: Tap) -> None:
        if self._lets_go:
            return
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
        self._call("blocked", blocked)

    def end(self, summary: Summary) -> None:
        """The VM has ended."""
        self._call_each("end", self._vm, summary)
        for tap, unrecorded in self._hooks["unrecorded"]:
            try:
                summary.unrecorded += unrecorded(self._vm)
            except BaseException as error:
                self._drop(tap, "unrecorded", error)
        for tap, not_its_own in self._dropped:
            for _, call in _callees((tap,), "missed_traps"):
                try:
                    call(self._vm, self._missed - not_its_own)
                except BaseException as error:  # dropped is dropped
                    _raise_interrupt(error)
                    log.debug("tap %s raised at its end", type(tap).__name__, exc_info=True)

    def _has(self, tap: Tap) -> bool:
        # By identity: a tap may say anything about being equal.
        return any(each is tap for each in self._taps)

    def _drop(self, tap: Tap, call: str, raised: BaseException) -> None:
        if not self._has(tap):
            # By two calls at a time, such as two that waited for its room.
            return
        self._taps = tuple(each for each in self._taps if each is not tap)
        for hook, callees in self._hooks.items():
            self._hooks[hook] = tuple(each for each in callees if each[0] is not tap)
        _raise_interrupt(raised)
        why = one_line(raised)
        error = raised if isinstance(raised, Exception) else RuntimeError(why)
        self._losses.append((tap, error))
        # The trap that `trap` raised at is not with the tap.
        self._dropped.append((tap, self._missed - (call == "trap")))
        name = type(tap).__name__
        log.error("vm %s: tap %s is dropped: its %s() raised %s", self._vm, name, call, why)
        log.debug("how tap %s raised", name, exc_info=raised)
        # A task that waits for its room holds a vCPU, and the tap that is dropped makes none.
        for scope, awaited in self._waits.items():
            if awaited is tap:
                scope.cancel()
        try:
            tap.dropped(self._vm, error)
        except BaseException as again:  # dropped is dropped: it has no further call
            _raise_interrupt(again)
            log.debug("tap %s raised when it was dropped", name, exc_info=True)

    def _report_losses(self) -> None:
        # After the call that brought it about was made to all: one that raises here, too, has had
        # that call, and gets no further one.
        while self._losses:
            lost, why = self._losses.pop(0)
            for tap, call in self._hooks["tap_lost"]:
                try:
                    call(self._vm, lost, why)
                except BaseException as error:
                    self._drop(tap, "tap_lost", error)


def _raise_interrupt(raised: BaseException) -> None:
    """The user's, most likely: it ends the program."""
    if isinstance(raised, KeyboardInterrupt):
        raise raised


def _callees(taps: Sequence[Tap], hook: str) -> tuple[tuple[Tap, Callable[..., Any]], ...]:
    """The taps that define a hook, and what is called.

    A tap need not derive from `Tap`, and may be older than the hook: an attribute of another kind
    that has its name by chance is none.
    """
    found = []
    for tap in taps:
        try:
            call = getattr(tap, hook, None)
        except Exception:  # such as a proxy that knows the older calls only
            call = None
        if callable(call) and getattr(call, "__func__", None) is not getattr(Tap, hook):
            found.append((tap, call))
    return tuple(found)
