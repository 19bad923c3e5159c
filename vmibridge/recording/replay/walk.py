"""One walk over a recording, for all VMs that are replayed from it.

Theory of operation
===================

The file is walked in its order, once. At each message the walk brings about what happened then,
and goes on when it has happened again:

| message | brought about | goes on when |
|---|---|---|
| trap | it is given to the server, at its time | its handler has begun, or it is answered |
| `queued` behind a trap | its handler lines up, and begins at the step `began` | it was taken |
| step `began` | the handler's turn, at its time | it has begun |
| step `resumed` | the handler may go on, at its time | it has |
| step `ended` | the handler may go on as often as it likes | it has ended |
| call of `vmi.outside` | its value is given, at its time | the handler has it |
| memory access | it is kept for its request | at once, or when a handler that waits for it has it |
| reply | deadlines pass that passed then | the trap is answered |

So handlers begin, go on and end in the recorded order, in all VMs, and what one leaves behind
another finds. A handler that is about to go on before its step is *held*. The times of messages are
those of the loop, where it has `VirtualTime`; else they matter with a `speed` only.

A changed handler may have other steps than the recorded one, and so may the same one on another
loop. Steps that are not made are left out when it has ended; further ones are made when it is to
end. Where the walk waits for a handler that waits for one that is held, those that are held go on
after a while (`Loosening`); where it waits for one that needs what is behind in the file, the walk
does. Nothing waits for ever.

Most traps are *plain*: the reply is what comes next. Such a trap is played with its reply, and has
no `ReplayedRequest` unless its handler does more than to answer (`open_requests`).

A recording of format 1 or 2 has no steps: there traps wait for the replies before them, and no
handler is held.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import anyio

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import PlainTrap, RecordedMessage, Session
from vmibridge.recording.replay.awaited import is_met
from vmibridge.recording.replay.journal import Journal
from vmibridge.recording.replay.patience import CHECK, Loosening, Patience
from vmibridge.recording.replay.player import Awaited, Player, Unfolding
from vmibridge.recording.replay.recorded_time import RecordedTime
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.source import RecordedVms, all_apart
from vmibridge.vm.backend import TrapSink, feed_held
from vmibridge.vm.trap import TrapEvent

__all__ = ["Walk"]

_EFFECTS = (Awaited.ANSWERED, Awaited.FETCHED, Awaited.READ)
"""What is waited for of replies, values from outside, and memory accesses. What other handlers do
meanwhile is before it."""
_MAX_AHEAD = 1024
"""Messages that are looked at for what comes of a request."""
_LATER = 1e-3
"""Seconds until a message is looked at again where that takes time."""


class Walk:
    """See the module. Each VM joins it before it runs; `speed` is that of `ReplayOptions`."""

    def __init__(self, path: Path, speed: float = 0.0) -> None:
        self.source: RecordedVms
        self._path = path
        self.time: RecordedTime = RecordedTime(speed)
        self._users = 0
        self._players: dict[str, Player] = {}
        self._absent: set[str] = set()
        """VMs that do not run yet."""
        self._batch: list[TimedMessage | PlainTrap] = []
        self._place = 0
        self._played = 0
        """Messages of the batches before."""
        self._apart = 0
        """Plain traps of VMs that are not played: each is two messages."""
        self.journal: Journal | None = None
        """Where it is noted what handlers do; `None`: nobody wants to know."""
        self._at_place = Patience()
        self._at_end = False
        self.plain: Unfolding | None = None
        """Who plays a plain trap: the walk waits for its answer."""
        self.awaited: ReplayedRequest | None = None
        self.what: Awaited = Awaited.TAKEN
        self.running: int = 0
        """Handlers that have begun and not ended."""
        self._held: dict[ReplayedRequest, float] = {}
        """With the time since when, by the clock of the loop."""
        self._full: deque[tuple[TrapSink, TrapEvent, Callable[[TrapEvent], object]]] = deque()
        self._pause = math.inf
        self._loosening = Loosening()
        self._is_driven = False
        self._poked = anyio.Event()
        self._changed = anyio.Event()

    # --- the VMs --------------------------------------------------------------------

    async def join(self, player: Player, name: str | None) -> tuple[str, Session | None]:
        """Have a VM of the file played; without a name the first. Raises as `RecordedVms`."""
        if not self._users:
            self.source = await in_own_thread(RecordedVms, self._path)
        self._users += 1
        try:
            found, session = await in_own_thread(self.source.find, name)
        except BaseException:  # whatever it is, nobody calls `leave`
            self.leave()
            raise
        self._players[found] = player
        self._absent.add(found)
        self.time.join(lambda: self.running > 0)
        self._loosening.is_real = not self.time.is_virtual
        return found, session

    def leave(self) -> None:
        """A VM is closed; the last one frees the file."""
        self._users -= 1
        if not self._users:
            self.source.close()

    def present(self, name: str) -> None:
        """A VM runs, or never will: the walk begins with the last one."""
        self._absent.discard(name)
        self.poke()

    async def drive(self, player: Player) -> None:
        """Play until nothing of this VM is left. Whose task comes first drives it for all."""
        while not self._is_done(player):
            if self._is_driven:
                await self._changed.wait()
                continue
            self._is_driven = True
            try:
                await self._round(player)
            finally:
                self._is_driven = False
                self.poke()

    def _is_done(self, player: Player) -> bool:
        at_end = self._at_end and self._place >= len(self._batch)
        return player.is_over or (at_end and not player.is_owed)

    async def _round(self, player: Player) -> None:
        self.go()
        # What that has come to is looked at here.
        self._poked = anyio.Event()
        if self._full:
            await feed_held(*self._full.popleft())
            return
        if self._place >= len(self._batch) and not self._at_end and not self._absent:
            await self._read_on()
            return
        if self._is_done(player):
            return
        now = self.time.now()
        with anyio.move_on_after(min(self._pause, self._loosening.at) - now):
            await self._poked.wait()
        if self._loosening.is_due(self.time.now()):
            self._loosen()
        self._pause = math.inf

    def poke(self) -> None:
        """There is something to do, or to see."""
        self._poked.set()
        self._changed.set()
        self._changed = anyio.Event()

    async def _read_on(self) -> None:
        with self.time.held():
            self._batch = await self.source.read_on()
        self._played += self._place
        self._place = 0
        if not self._batch:
            self._at_end = True
            for player in self._players.values():
                player.at_end()

    # --- the walk -------------------------------------------------------------------

    def go(self) -> None:
        """Go on in the file as far as nothing has to be waited for."""
        if self._absent:
            return
        while True:
            if self.plain is not None:
                if not self._held:
                    return
                self.plain.unfold()
            if self.awaited is not None:
                if not (is_met(self.awaited, self.what) or self.awaited.is_passed_over):
                    self._may_loosen()
                    return
                self.awaited = None
                self._be_patient()
            if self._full or self._place >= len(self._batch):
                break
            each = self._batch[self._place]
            if isinstance(each, PlainTrap):
                player = self._players.get(each.event.vm)
                self._apart += player is None or player.is_over
                if not (
                    player is None
                    or player.is_over
                    or player.play_plain(each.time, each.event, each)
                ):
                    # So are those behind it, as far as they have to be.
                    self._played += self._place
                    self._batch, self._place = all_apart(self._batch[self._place :]), 0
                    continue
            elif not self._play(each):
                return
            self._place += 1
        self.poke()

    def _play(self, message: TimedMessage) -> bool:
        """`False`: it is not its time yet."""
        name = message.message.vm
        player = None if name is None else self._players.get(name)
        if player is None or player.is_over:
            return True
        return player.play(message, self._message_at(self._place + 1))

    def _message_at(self, place: int) -> RecordedMessage | None:
        """That of the batch, where there is one, and no plain trap."""
        each = self._batch[place] if place < len(self._batch) else None
        return None if each is None or isinstance(each, PlainTrap) else each.message

    def wait_for(self, request: ReplayedRequest, what: Awaited) -> None:
        """Go no further until this has happened."""
        self.awaited, self.what = request, what

    def place(self) -> int:
        """That of the message that is played or comes next, or of the one whose effect is waited
        for: how many of these VMs stand before it."""
        waits = self.awaited is not None and self.what in _EFFECTS
        return self._played + self._place + self._apart - waits

    def skip(self) -> None:
        """The message behind the one that is played now is played with it."""
        self._place += 1

    def let_go(self, requests: Iterable[ReplayedRequest]) -> None:
        """Nothing of these is waited for any more."""
        for request in list(requests):
            if request is self.awaited:
                self.awaited = None
            request.over = request.free = True
            request.go_on()

    def is_due(self, at: int) -> bool:
        """Whether what was recorded at a time may happen; else the walk goes on when it may."""
        # Where no handler runs, no task has anything to do before.
        return self._pauses_until(self.time.due(at, jumps=not self.running))

    def is_as_late(self, request: ReplayedRequest, at: int) -> bool:
        """Whether its handler has had the time that it had then, at `at`; else the walk goes on
        when it has. What it waited for was there perhaps when it was cut off."""
        return self._pauses_until(self.time.as_late(request.last_step, at))

    def _pauses_until(self, due: float | None) -> bool:
        if due is None:
            return True
        self._pause = due
        self.poke()
        return False

    def further_step(self) -> None:
        """A handler makes a step that was not recorded."""
        if self.time.is_virtual and (passed := self._at_place.step(self.time.now())):
            self.time.pass_by(passed)

    def looks_again(self) -> bool:
        """Whether to play this message in a moment, when other tasks have run; not for ever."""
        if not self._at_place.looks_again(self._played + self._place):
            return False
        self._pause = self.time.now()
        self.poke()
        return True

    def looks_later(self) -> bool:
        """As `looks_again`, and time goes on meanwhile: what a handler waits for may come."""
        if not self.looks_again():
            return False
        self._pause += _LATER
        return True

    def lets_go_on(self, request: ReplayedRequest) -> bool:
        """Let a handler go on, if it is held, and look again when it has; not for ever."""
        if request in self._held:
            request.loose = True
            request.go_on()
        return self.looks_again()

    def is_held(self, request: ReplayedRequest) -> bool:
        """Whether its handler waits for nothing but its step."""
        return request in self._held

    def held_since(self, request: ReplayedRequest) -> int | None:
        """Since when that is so, or since when it waits in a call of `vmi.outside`, as
        `RecordedTime.recorded`; `None`: it does not, or that is not known."""
        since = self._held.get(request, request.asks_since)
        return None if since is None else self.time.recorded(since)

    def ahead(self) -> Iterator[TimedMessage]:
        """What comes behind the message that is played, as far as it was read, but for plain traps;
        not all of it."""
        for each in self._batch[self._place + 1 : self._place + _MAX_AHEAD]:
            if not isinstance(each, PlainTrap):
                yield each

    def feed_later(
        self, sink: TrapSink, event: TrapEvent, refuse: Callable[[TrapEvent], object]
    ) -> None:
        """The queue of a VM is full: give it this trap when it has room."""
        self._full.append((sink, event, refuse))
        self.poke()

    def postpones(self, request: ReplayedRequest) -> float:
        """Seconds until a deadline may pass that did not pass then; 0: the walk is stuck."""
        now = self.time.now()
        if now < self._pause < math.inf:
            return self._pause - now + CHECK
        if self._held and (loosened := self._loosening.after(now)):
            # It may wait for one that is held, as with a lock.
            return loosened + CHECK
        elsewhere = self.awaited not in (None, request)
        is_stuck = self._at_place.is_stuck(self._played + self._place, now, elsewhere=elsewhere)
        return 0.0 if is_stuck and not self._passes_over() else CHECK

    def makes_way(self, request: ReplayedRequest) -> float:
        """Seconds until the deadline of a request may pass whose reply was read, and whose handler
        has not begun: it may wait for the place of one that waits for what is behind."""
        if self._at_end or not self._is_needed_behind():
            return 0.0
        if self.awaited is request:
            self._passes_over()
        return CHECK

    def _is_needed_behind(self) -> bool:
        return any(each.needs_behind for each in self._players.values())

    def _passes_over(self) -> bool:
        """Whether to go on in the file, stuck: what is waited for may wait for another handler, as
        for its place, and that one for what is behind."""
        if self.awaited is None or not self._is_needed_behind():
            return False
        self.awaited = None
        self._at_place.start_again()
        self._be_patient()
        self.poke()
        return True

    # --- handlers that are held -----------------------------------------------------

    async def hold(self, request: ReplayedRequest, may_go: Callable[[], bool]) -> None:
        """Hold a handler until it may go on."""
        self._held[request] = self.time.now()
        self._may_loosen()
        try:
            # What a handler waited for is its own by now, such as a lock, and a primitive of trio
            # does not give it back. On asyncio a scope that was cancelled would keep the loop busy.
            with anyio.CancelScope(shield=True):
                while not may_go() and not request.loose:
                    await request.gate().wait()
        finally:
            self._held.pop(request, None)
            request.loose = False

    def _may_loosen(self) -> None:
        if self.plain is not None:
            self.plain.unfold()
        awaited = self.awaited
        if awaited is None or self._loosening.is_set:
            return
        needs = awaited.needs_more or awaited.may_need_retry
        if self._held or needs or awaited.may_not_call(self.what):
            self._loosening.set(self.time.now())
            self.poke()

    def _be_patient(self) -> None:
        """Another one is waited for from here on."""
        self._loosening.start_again()

    def _loosen(self) -> None:
        """Who is waited for may wait for who is held, or for what comes next in the file."""
        if self.awaited is not None and self.awaited.may_not_call(self.what):
            self.awaited.outside.awaited = None
            if self.what is Awaited.RESUMED:
                self.awaited = None
                self._loosening.unset()
                self.go()
                return
        self._loosening.happens()
        if self.awaited is not None and self.awaited.pass_over():
            self.awaited = None
            self._be_patient()
            return
        for request in self._held:
            request.loose = True
            request.go_on()
        self._may_loosen()
