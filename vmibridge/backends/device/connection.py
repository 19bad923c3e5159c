"""One QEMU: its socket, the slots that it maps, its memory; who answers its accesses, and when.

An access holds QEMU's big lock until it is answered: meanwhile no other vCPU's access, and no
monitor, goes on. So two read the socket and answer:

| who | when | what |
|---|---|---|
| the event loop | always | takes calls, and answers their accesses with the answers |
| a thread (`Watch`) | the loop has done nothing for `hold` | acknowledges, and takes what came |

Both hold the lock while they are at it. What the thread has for the loop waits in `_news` until the
loop turns.

| a call's access is | until |
|---|---|
| held | the answer, which goes into the slot before the access is answered |
| acknowledged, state 3 | `hold` has passed, QEMU is asked for memory, or the loop stands still |

Invariants:

- Nothing is sent that QEMU may have given up (`MessageStream`): such a request is done as if it had
  been answered.
- Of one slot at most one access is held.
- While memory is asked of QEMU, no access is held: QEMU answers when its lock is free.
- All is for the event loop, but what is said to be for the thread. What takes the lock says so.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from threading import Lock
from time import monotonic
from typing import Any, Final

import anyio

from vmibridge.aio import sockets
from vmibridge.aio.listening import sleep_late
from vmibridge.aio.lookahead import Lookahead
from vmibridge.aio.loops import loop_door, while_readable
from vmibridge.aio.own_thread import in_own_thread
from vmibridge.backends.device.interrupts import Interrupts
from vmibridge.backends.device.keeper import keep
from vmibridge.backends.device.mailbox import Mailbox
from vmibridge.backends.device.memory import GuestRanges
from vmibridge.backends.device.pending import Pending
from vmibridge.backends.device.slots import (
    DOORBELL_CALL,
    DOORBELL_CANCEL,
    Call,
    Limits,
    Slots,
    shared_areas,
    slot_of_doorbell,
)
from vmibridge.backends.device.stream import MessageStream, close_all
from vmibridge.backends.device.transfer import Transfer
from vmibridge.backends.device.vfio_user import Access, Bar, DmaMap, VfioUser
from vmibridge.backends.device.watch import Watch
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import BackendError

__all__ = ["Connection"]

log: logging.Logger = logging.getLogger(__name__)

_HANDSHAKE: Final = 5.0
"""Seconds."""
_AT_ONCE: Final = 16
"""Receptions of the thread that follow each other."""


class Connection:
    """A QEMU that has connected. It owns the socket; `serve` is its life."""

    def __init__(
        self,
        connected: socket.socket,
        slots: int,
        limits: Limits,
        on_call: Callable[["Connection", Pending], None],
        on_abandoned: Callable[[Call], None],
    ) -> None:
        """Raises `OSError` when there is no memory for the slots.

        On the event loop, `on_call` is given each call, and `on_abandoned` each whose guest does
        not wait any more.
        """
        self.socket = connected
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.mailbox: Mailbox = Mailbox(slots, limits)
        except BaseException:
            os.close(self._wake)
            raise
        self.slots: Slots = self.mailbox.slots
        self.ranges: GuestRanges = GuestRanges()
        self.lock: Lock = Lock()
        self.released: int = 0
        """Accesses that were acknowledged without an answer."""
        self.used: set[int] = set()
        """Slots that have called."""
        bar = Bar(self.mailbox.size, self.mailbox.descriptor, shared_areas(slots))
        self._protocol = VfioUser(self, bar, max(1, limits.vectors))
        self._hold = limits.hold_us / 1e6
        self._timeout = limits.timeout_ms / 1e3
        self.stream: MessageStream = MessageStream(connected, self._timeout)
        self._on_call, self._on_abandoned = on_call, on_abandoned
        self._held: dict[int, Pending] = {}
        self._cancelled: set[int] = set()
        self._interrupts = Interrupts()
        self._news: deque[tuple[Callable[[Any], None], object]] = deque()
        self._max_news = 16 + 4 * slots
        self._transfers: dict[int, Transfer] = {}
        self._transfer_room = anyio.Semaphore(1)
        self.loop_turns: int = 0
        self._lookahead = Lookahead()
        self.broken: Exception | None = None
        self.is_over: bool = False

    # --- its life -------------------------------------------------------------------

    async def serve(self) -> None:
        """Answer QEMU until it hangs up, or `end`. If cancelled, does as `end`.

        Raises `ValueError` when it broke the protocol; at its end `OSError` or
        `anyio.EndOfStream`.
        """
        ended: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                watch = Watch(self, self._wake, self._hold, self._timeout)
                # In the context of here: anyio has to know its loop in what the thread has for it.
                soon = partial(loop_door(), copy_context().run)
                tasks.start_soon(in_own_thread, watch.run, soon)
                tasks.start_soon(self._expect_version)
                kept = self.socket.fileno(), self.mailbox.descriptor, self.slots.count
                tasks.start_soon(keep, *kept)
                try:
                    await while_readable(self.socket, self._take)
                except (anyio.EndOfStream, OSError, ValueError) as error:
                    ended = error
                finally:
                    self.end()
                tasks.cancel_scope.cancel()
        finally:
            self._deliver()
            self._free()
        if ended is not None:
            raise ended

    async def _expect_version(self) -> None:
        await sleep_late(_HANDSHAKE)
        if not self.is_qemu:
            with self.lock:
                self.hang_up(ValueError(f"no VERSION within {_HANDSHAKE:.0f} seconds"))

    @property
    def is_qemu(self) -> bool:
        """Whether it has spoken the protocol, or its guest has called: it did not only connect."""
        return self._protocol.has_begun or bool(self.used)

    def end(self) -> None:
        """Answer what is open, as if nobody were there, and hang up. Takes the lock."""
        with self.lock:
            if self.is_over:
                return
            self.is_over = True
            waiting = self.slots.open_calls
            self.slots.end()
            for call in waiting:
                self._answer_held(call.slot)
                self._signal(call)
            with suppress(OSError):
                self._flush()
            self.stream.hang_up()
            os.eventfd_write(self._wake, 1)
            for transfer in self._transfers.values():
                self._news.append((self._end_transfer, (transfer, None)))
            self._transfers.clear()
        self._deliver()

    @property
    def has_hung_up(self) -> bool:
        """Whether QEMU has, though that may not have been come to yet."""
        return sockets.has_hung_up(self.stream.socket)

    def _free(self) -> None:
        self._protocol.close()
        self.ranges.clear()
        self._interrupts.close()
        self.mailbox.close()
        os.close(self._wake)
        self.stream.close()

    # --- what comes -----------------------------------------------------------------

    def _take(self) -> bool:
        """The socket can be read, on the loop."""
        self._lookahead.turned()
        self._take_some()
        return not self.is_over

    def look(self) -> None:
        """Take the next call, if it comes at once (`Lookahead`). Takes the lock."""
        try:
            self._lookahead.look(self._take_now)
        except (anyio.EndOfStream, OSError, ValueError) as error:
            with self.lock:
                self.hang_up(error)
        else:
            self._deliver()

    def _take_now(self) -> bool:
        with self.lock:
            return self.is_over or self.broken is not None or self._receive()

    def _take_some(self) -> None:
        with self.lock:
            if self.is_over:
                return
            if self.broken is not None:
                raise self.broken
            self.loop_turns += 1
            self._receive()
        self._deliver()

    def hang_up(self, error: Exception) -> None:
        """For the task that receives: the end that it sees now wakes it."""
        self.broken = self.broken or error
        self.stream.hang_up()

    def _receive(self) -> bool:
        """Take what there is, with the lock held. Returns whether there was something."""
        came = self.stream.receive()
        if came is None:
            return False
        self._protocol.is_mute = self.stream.is_late(self.stream.sent_after)
        try:
            self._protocol.receive(*came)
        finally:
            self._protocol.is_mute = False
        self._flush()
        return True

    def _deliver(self) -> None:
        """Hand on what came, without the lock: the engine may answer at once."""
        while self._news:
            function, what = self._news.popleft()
            function(what)

    # --- what QEMU asks: `vfio_user.Host`, with the lock held ---------------------------

    def access(self, access: Access) -> None:
        """Take a ring, or answer."""
        where = slot_of_doorbell(access.offset, self.slots.count)
        if access.data is None:
            state = b""
            if where is not None and where[1] == DOORBELL_CALL:
                state = self.slots.state(where[0]).to_bytes(4, "little")
            self._protocol.reply(access, state[: access.size].ljust(access.size, b"\0"))
        elif where is not None and where[1] == DOORBELL_CALL:
            self._ring(where[0], access)
        else:
            if where is not None and where[1] == DOORBELL_CANCEL:
                self._cancel(where[0], int.from_bytes(access.data, "little"))
            self._protocol.reply(access)

    def _ring(self, slot: int, access: Access) -> None:
        call = self.slots.take(slot)
        if call is None:
            self._protocol.reply(access)
            return
        pending = Pending(call, access, self.stream.received_at, self.stream.sent_after)
        self._held[slot] = pending
        self.used.add(slot)
        if self._protocol.is_mute or self._transfers or not self._hold or not access.wants_reply:
            self._acknowledge(slot)
        self._cancelled.discard(slot)
        self._tell(self._call, pending)

    def _call(self, pending: Pending) -> None:
        if not self.is_over:
            self._on_call(self, pending)

    def _tell(self, function: Callable[[Any], None], what: object) -> None:
        """Have it called on the loop. Raises `ValueError` for a QEMU that makes up calls."""
        if len(self._news) > self._max_news:
            raise ValueError("more calls and resets than a guest can make")
        self._news.append((function, what))

    def _cancel(self, slot: int, number: int) -> None:
        call = self.slots.open_call(slot)
        is_it = call is not None and call.number == number & 0xFFFF_FFFF
        if is_it and slot not in self._cancelled:
            self._cancelled.add(slot)
            self._tell(self._on_abandoned, call)

    def map(self, mapping: DmaMap, descriptor: int | None) -> int:
        """A range of memory."""
        refused = self.ranges.refused
        why = self.ranges.map(mapping, descriptor)
        if self.ranges.refused > refused == 0:
            log.warning(
                "guest memory is in a file that is no sealed memfd: it is reached through QEMU;"
                " use memory-backend-memfd,share=on"
            )
        return why

    def unmap(self, address: int, size: int) -> int:
        """No such range any more."""
        return self.ranges.unmap(address, size)

    def unmap_all(self) -> None:
        """No range any more."""
        self.ranges.clear()

    def set_interrupts(self, first: int, count: int, descriptors: Sequence[int]) -> None:
        """The eventfds of interrupts."""
        self._interrupts.set(first, count, descriptors)

    def reset(self) -> None:
        """The machine was reset: no call is open any more."""
        for slot in list(self._held):
            self._answer_held(slot)
        for call in self.slots.reset():
            self._tell(self._on_abandoned, call)

    def transferred(self, transfer: int, data: bytes | None) -> None:
        """QEMU has answered a transfer."""
        self._tell(self._end_transfer, (self._transfers.pop(transfer), data))

    def drop(self, descriptors: Sequence[int]) -> None:
        """Close descriptors."""
        close_all(descriptors)

    # --- answers --------------------------------------------------------------------

    def answer(self, pending: Pending, values: Sequence[int | None] | None) -> None:
        """Write the answer of a call, `None` for none, and let its caller see it. Takes the lock.

        Raises `BackendError` when QEMU is gone. After a reset nothing is written.
        """
        call = pending.call
        with self.lock:
            if self.is_over:
                raise BackendError(GONE)
            slots = self.slots
            is_open = slots.decline(call) if values is None else slots.answer(call, values)
            if not is_open:
                return
            if pending.access is not None:
                self._answer_held(call.slot)
                try:
                    self._flush()
                except OSError as error:
                    raise BackendError(f"{GONE}: {error.strerror}") from error
            else:
                self._signal(call)

    def _answer_held(self, slot: int) -> None:
        """Answer the access that a slot has, if it has one, and if QEMU still waits for it."""
        pending = self._held.pop(slot, None)
        if pending is None or pending.access is None:
            return
        access, pending.access = pending.access, None
        if not self.stream.is_late(pending.sent_after):
            self._protocol.reply(access)

    def _acknowledge(self, slot: int) -> None:
        self.slots.hold(self._held[slot].call)
        self.released += 1
        self._answer_held(slot)

    def _signal(self, call: Call) -> None:
        if call.wants_interrupt:
            self._interrupts.signal(call.slot)

    def _flush(self) -> None:
        self.stream.flush(self._protocol.out)

    # --- guest memory through QEMU ----------------------------------------------------

    async def transfer(self, address: int, size: int, data: bytes | None = None) -> bytes | None:
        """Read `size` bytes, or write `data`; both at most `max_transfer`. Takes the lock.

        Returns `None` where QEMU cannot, or is gone. Cancelled, it is written or not.
        """
        # One at a time, from its request to its reply: so the socket has room for each.
        await self._transfer_room.acquire()
        transfer = Transfer()
        with self.lock:
            if self.is_over:
                self._transfer_room.release()
                return None
            try:
                for slot in list(self._held):
                    self._acknowledge(slot)
                if data is None:
                    number = self._protocol.read_memory(address, size)
                else:
                    number = self._protocol.write_memory(address, data)
                self._transfers[number] = transfer
                self._flush()
            except OSError as error:
                self.hang_up(error)
        await transfer.ended.wait()
        return transfer.data

    def _end_transfer(self, ended: tuple[Transfer, bytes | None]) -> None:
        transfer, data = ended
        transfer.data = data
        transfer.ended.set()
        self._transfer_room.release()

    @property
    def max_transfer(self) -> int:
        """Bytes of one transfer."""
        return self._protocol.max_transfer

    # --- for the thread, with the lock held -------------------------------------------

    def take_over(self) -> None:
        """Do what the loop does not: take what came, acknowledge all, and keep it for the loop."""
        for _ in range(_AT_ONCE):
            if not self._receive():
                break
        self.acknowledge(0.0)

    def acknowledge(self, hold: float) -> None:
        """Answer each access that has waited for so many seconds. Raises `OSError`."""
        if self._held:
            until = monotonic() - hold
            for slot in [slot for slot, each in self._held.items() if each.since <= until]:
                self._acknowledge(slot)
        if self._protocol.out:
            self._flush()

    @property
    def is_idle(self) -> bool:
        """Whether no access waits and nothing is left to be sent."""
        return not self._held and not self._protocol.out

    @property
    def has_news(self) -> bool:
        """Whether something waits for the loop."""
        return bool(self._news)

    def deliver_for_thread(self) -> None:
        """On the loop: what the thread has taken."""
        self.loop_turns += 1
        self._deliver()
