"""A recording as a backend: the guest is played from the file, with no VM at all.

    replay:FILE.mcap?speed=0&order=recorded&vm=NAME&strict=false

Rules:

- The file is walked in its order, once (`_walk`). A trap is given to the server; a memory
  access is kept for its request; a reply holds the walk until the server has answered that
  trap, too, and a trap until the server has taken the one before. So handlers begin in the
  recorded order, and run together where they did then. With `order=vcpu` only the traps of
  one vCPU wait for each other.
- Memory is served from the recording, to the request that accessed it (`replayed`).
- A request that was told to wait then, and is answered at once now, is done: its retries
  are left out. One that is told to wait now asks again, with the recorded retries.
- The first run of a VM is replayed. What a file has of later ones, as when files were put
  together, is counted and left out: each run had handlers of its own, from the start.
- A request that began in another file, where a recording was split, is left out.
- A trap that the policy denied then never reached a handler, and does not now. Values that
  were left out of the recording are not there to be asked with.

Nothing in here is bounded by the file: what is held is bounded by `_MAX_HELD`.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.errors import BackendError, BackendSpecError, GuestMemoryError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import MemoryAccess, Note, Reply, Session, architecture_of
from vmibridge.recording.replay import options as reasons
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.options import ReplayOptions, ReplayResult
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.replay.source import RecordedVm
from vmibridge.recording.replay.tally import Tally
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd, feed, feed_held
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

R = TypeVar("R")

_MAX_HELD = 32 << 20
"""Bytes of memory accesses that may be held for requests that run."""
_MAX_OPEN = 16_384
"""Requests that may be open at a time."""


class ReplayBackend(Backend, Tap):
    """One VM of a recording. Raises `BackendSpecError` if an option is out of range."""

    def __init__(
        self,
        path: Path,
        options: ReplayOptions | None = None,
        vm: str = "vm",
        on_difference: Callable[[Difference], None] | None = None,
        *,
        verdict: Verdict | None = None,
    ) -> None:
        super().__init__(vm)
        options = options or ReplayOptions()
        if not 0 <= options.speed < math.inf:
            raise BackendSpecError(f"replay:{path}: speed={options.speed} is no number from 0")
        self.path = path
        self.options = options
        self.session: Session | None = None
        """What served this VM then; known once the backend is open, if the file tells."""
        self.reader: RecordingReader
        self._tally = Tally(verdict or Verdict(), on_difference)
        self._source: RecordedVm
        self._batch: list[TimedMessage] = []
        self._place = 0
        self._at_end = False
        self._has_begun = self._is_later = False
        self._has_server = False
        self._wait = ServerSettings().wait.value1
        self._open: dict[int, ReplayedRequest] = {}
        self._unanswered: set[int] = set()
        self._untaken: TrapEvent | None = None
        self._awaited: ReplayedRequest | None = None
        self._busy: dict[int, deque[TrapEvent]] = {}
        self._vcpus: set[int] = set()
        self._held = 0
        self._stopped = False
        self._stop_for: Callable[[Exception], None]
        self._poked = anyio.Event()
        self._arrived = anyio.Event()
        self._sink: TrapSink
        self._full: deque[TrapEvent] = deque()
        self._start: tuple[float, int] | None = None
        self._pause = 0.0

    @property
    def result(self) -> ReplayResult:
        """What came of it so far."""
        return self._tally.result

    @property
    def started(self) -> int:
        """When the first trap was taken then, in nanoseconds since the Unix epoch; 0 until then."""
        return self._tally.started

    # --- the life of a backend ------------------------------------------------------

    async def open(self) -> None:
        """Open the file and find the VM.

        Raises `RecordingReadError` for a file that is no recording, `BackendSpecError` for a
        VM that is not in it.
        """
        self._source = await in_own_thread(RecordedVm, self.path, self.options.vm)
        self.reader, self.session = self._source.reader, self._source.session
        if self.session is not None:
            self.architecture = architecture_of(self.session)
            self._wait = self.session.settings.wait.value1
        self._tally.begin(self._source.name, self.session, self.stop)

    async def close(self) -> None:
        self._source.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Play the recording to its end."""
        self._sink = sink
        while not self._stopped:
            self._poked = anyio.Event()
            self._walk()
            if self._full:
                await feed_held(self._sink, self._full.popleft(), self._refuse)
            elif self._place < len(self._batch):
                with anyio.move_on_after(
                    self._pause - anyio.current_time() if self._pause else None
                ):
                    await self._poked.wait()
                self._pause = 0.0
            elif not self._at_end:
                await self._read_on()
            elif self._unanswered:
                await self._poked.wait()
            else:
                break
        for request in dict.fromkeys(self._open.values()):
            self._close(request, "the recording ends before its answer")
        ends = [
            VcpuEnd(vcpu, "stopped" if self._stopped else "halted", "the recording ends here")
            for vcpu in sorted(self._vcpus)
        ]
        return GuestEnd(tuple(ends))

    def stop(self) -> None:
        """Play no further."""
        self._stopped = True
        self._poked.set()

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Take the answer. Raises `BackendError` for a trap that waits for none."""
        if event.seq not in self._unanswered:
            raise BackendError(f"trap {event.seq} was answered before, or never played")
        if writes is None or not self._has_server:
            # No tap sees one that is not ours, and none where an agent carries them.
            self._answer(event, None, writes)

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """The recorded bytes. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        data = await self._taken(request, partial(request.take_read, address, size))
        return request.read_unrecorded(address, size) if data is None else data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """As it went then. Waits where the recording was not read as far."""
        request = self._request_of(event, address)
        if await self._taken(request, partial(request.take_write, address, data)) is None:
            request.write_unrecorded(address, data)

    async def _taken(self, request: ReplayedRequest, take: Callable[[], R | None]) -> R | None:
        """What `take` finds among the recorded accesses; `None`: there is no such."""
        while True:
            before = request.held
            try:
                found = take()
            finally:
                self._held -= before - request.held
            if found is not None or request.over:
                return found
            await self._further_accesses(request)

    def begin(
        self, vm: str, bridge: Bridge, settings: ServerSettings, stop: Callable[[Exception], None]
    ) -> None:
        self._stop_for = stop
        self._has_server = True
        self._tally.verdict.hear_handlers(self._source.name, bridge.handlers)

    def dropped(self, vm: str, error: Exception) -> None:
        """Without these calls it cannot go on: it would wait for ever."""
        self._stop_for(error)

    def trap(self, event: TrapEvent) -> None:
        if event is self._untaken:
            self._untaken = None
            self._walk()

    def answered(self, outcome: Outcome[Any]) -> None:
        assert outcome.event is not None
        self._answer(outcome.event, outcome)

    async def _read_on(self) -> None:
        self._batch = await self._source.read_on()
        self._place = 0
        if not self._batch:
            self._at_end = True
            for request in dict.fromkeys(self._open.values()):
                request.over = True
            self._arrive()

    # --- the walk -------------------------------------------------------------------

    def _walk(self) -> None:
        """Go on in the file as far as nothing has to be waited for."""
        if self._awaited is not None:
            if not self._awaited.answered and not self._stopped:
                return
            self._awaited = None
        batch = self._batch
        while not self._stopped and not self._full and self._place < len(batch):
            time, message = batch[self._place]
            if isinstance(message, TrapEvent):
                goes_on = self._walk_trap(time, message)
            elif isinstance(message, MemoryAccess):
                goes_on = self._walk_access(message)
            elif isinstance(message, Reply):
                goes_on = self._walk_reply(message)
            else:
                goes_on = True
                if isinstance(message, Session):
                    self._is_later = self._has_begun
                    self._has_begun = True
            if not goes_on:
                return
            self._place += 1
        self._poked.set()

    def _walk_trap(self, time: int, event: TrapEvent) -> bool:
        self._has_begun = True
        if self._is_later:
            self._tally.leave_unchecked(reasons.LATER, event, time)
            return True
        if self._tally.is_behind(event, time):
            return True
        if self._untaken is not None or (self.options.speed and not self._is_due(time)):
            return False
        if len(self._open) >= _MAX_OPEN:
            if self._unanswered:
                return False
            self._close(next(iter(self._open.values())), reasons.NO_REPLY)
        if event.seq in self._open:
            self._tally.leave_unchecked(reasons.TWICE, event, time)
            return True
        after = self._batch[self._place + 1].message if self._place + 1 < len(self._batch) else None
        if event.vm != self.vm:
            event = msgspec.structs.replace(event, vm=self.vm)
        if isinstance(after, Note) and after.seq == event.seq:
            if after.retry_of in self._open:
                self._walk_retry(self._open[after.retry_of], event)
            else:
                # What it did before is in another file, or lost.
                self._tally.leave_unchecked(reasons.BEFORE, event, time)
            return True
        if isinstance(after, Reply) and after.seq == event.seq and after.kind is OutcomeKind.DENIED:
            self._tally.leave_unchecked("the policy denied it", event, time, after)
            return True
        left_out = self._tally.left_out(event) - {"memory"}
        if left_out:
            why = f"{', '.join(sorted(left_out))} was left out of the recording"
            self._tally.leave_unchecked(why, event, time)
            return True
        self._open[event.seq] = ReplayedRequest(
            event, time, strict=self.options.strict, keep=self._tally.keeps
        )
        self._feed(event)
        return True

    def _walk_retry(self, request: ReplayedRequest, event: TrapEvent) -> None:
        request.seqs = (*request.seqs, event.seq)
        self._open[event.seq] = request
        if request.wants_retry:
            request.wants_retry = False
            self._feed(event)
        elif not request.answered:
            request.retries.append(event)

    def _walk_access(self, access: MemoryAccess) -> bool:
        request = None if self._is_later else self._open.get(access.seq)
        if request is None:
            return True
        if request.answered:
            request.leave_out(access)
            return True
        if self._held > _MAX_HELD and not request.blocked:
            return False
        self._held += request.attach(access)
        if request.blocked:
            self._arrive()
        return True

    def _walk_reply(self, reply: Reply) -> bool:
        request = None if self._is_later else self._open.get(reply.seq)
        if request is None or reply.kind is OutcomeKind.WAITING:
            return True
        if not request.over:
            request.over, request.reply = True, reply
            if request.blocked:
                self._arrive()
            if request.wants_retry:
                # The recorded retries are used up: it is slower now.
                request.wants_retry = False
                self._ask_on(request)
        if request.answered:
            self._close(request)
            return True
        if self.options.order == "recorded":
            self._awaited = request
            return False
        return True

    def _is_due(self, time: int) -> bool:
        now = anyio.current_time()
        if self._start is None:
            self._start = (now, time)
        since, first = self._start
        due = since + (time - first) / 1e9 / self.options.speed
        if due <= now:
            return True
        self._pause = due
        self._poked.set()
        return False

    # --- requests -------------------------------------------------------------------

    def _request_of(self, event: TrapEvent, address: int) -> ReplayedRequest:
        request = self._open.get(event.seq)
        if request is None:
            raise GuestMemoryError(address, "it is not in the recording")
        return request

    async def _further_accesses(self, request: ReplayedRequest) -> None:
        request.blocked = True
        arrived = self._arrived
        self._walk()
        if not arrived.is_set():
            await arrived.wait()

    def _arrive(self) -> None:
        for request in dict.fromkeys(self._open.values()):
            request.blocked = False
        self._arrived.set()
        self._arrived = anyio.Event()

    def _feed(self, event: TrapEvent) -> None:
        self._vcpus.add(event.vcpu)
        self._unanswered.add(event.seq)
        if self.options.order == "vcpu":
            queue = self._busy.get(event.vcpu)
            if queue is not None:
                queue.append(event)
                return
            self._busy[event.vcpu] = deque()
        elif self._has_server:
            # Elsewhere, where an agent carries it, no tap tells that it was taken.
            self._untaken = event
        self._put(event)

    def _put(self, event: TrapEvent) -> None:
        if self._full:
            self._full.append(event)
            return
        feed(self._sink, event, self._hold, self._refuse)

    def _hold(self, event: TrapEvent) -> None:
        self._full.append(event)
        self._poked.set()

    def _refuse(self, event: TrapEvent) -> None:
        self._unanswered.discard(event.seq)
        self.stop()

    def _answer(
        self, event: TrapEvent, outcome: Outcome[Any] | None, writes: RegisterWrites | None = None
    ) -> None:
        if event.seq not in self._unanswered:
            return
        self._unanswered.discard(event.seq)
        if event is self._untaken:
            # It ran natively: no tap saw it.
            self._untaken = None
        if self.options.order == "vcpu":
            queue = self._busy[event.vcpu]
            if queue:
                self._put(queue.popleft())
            else:
                del self._busy[event.vcpu]
        request = self._open.get(event.seq)
        if request is not None:
            if writes is not None:
                waits = request.is_told_to_wait(writes, self._wait)
            else:
                waits = outcome is not None and outcome.kind is OutcomeKind.WAITING
            if waits:
                self._ask_again(request, event)
            else:
                request.answered, request.outcome, request.writes = True, outcome, writes
                request.drop_retries()
                if request.over and self.options.order == "vcpu":
                    self._close(request)
        self._walk()

    def _ask_again(self, request: ReplayedRequest, event: TrapEvent) -> None:
        if request.retries:
            self._feed(request.retries.popleft())
        elif request.over and request.reply is not None:
            self._ask_on(request)
        elif not request.over:
            request.wants_retry = True

    def _ask_on(self, request: ReplayedRequest) -> None:
        """One more retry, which the recording does not have: so it has a number of its own."""
        event, unused = request.further_retry()
        if unused is not None:
            self._open.pop(unused, None)
        self._open[event.seq] = request
        self._feed(event)

    def _close(self, request: ReplayedRequest, why: str | None = None) -> None:
        for seq in (request.event.seq, *request.seqs):
            self._open.pop(seq, None)
        self._held -= request.held
        self._tally.close(request, why)
