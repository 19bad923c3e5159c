"""What handlers do in a replay, and where in the recording, for the recording of their new answers.

    walk plays   trap 1   trap 2      resumed 1   reply 1      reply 2
    place           0        1            2          3            4
    journal                        ^ 2: resumed of 2           ^ 4: resumed of 2

A changed handler has other steps, and has them in another order among those of other requests. So
the new recording gets the steps of now, where they were made: each event has the *place* of the
message that the walk was about to play, and stands before that one. Then a replay of the new
recording brings about the order of now, as a replay of any recording does.

- Places count the messages of the VMs that are replayed. While the walk waits for the effect of a
  message, such as the answer to a reply, its place is that of the message.
- An event has no content: the new answers have it (`accept`).
- `parked` is left as it was: the guest got WAIT in the recording, and its retries are in the file.
  Where its handler has not begun by then now, the server forgets it, and the retry is the first
  trap of a new request.
- 29 bytes of memory for an event; a request that is plain now as it was then has one.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from vmibridge.engine.taps import Step as StepKind
from vmibridge.recording.messages import Step
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.steps import Steps
from vmibridge.vm.trap import TrapEvent

__all__ = ["EventKind", "Journal", "JournalEvent"]

_EVENT = Struct("<QQQIB")
_MAX_TIME = (1 << 64) - 1
_KIND_AT = 28
"""Bytes from the beginning of an event to its kind."""


class EventKind(IntEnum):
    """What has happened."""

    BEGAN = 0
    RESUMED = 1
    THROWN = 2
    ENDED = 3
    CUT_OFF = 4
    ACCESS = 5
    """The next one of its request that is not where the recording has it."""
    OUTSIDE = 6
    """The same of `vmi.outside`."""
    TRAP = 8
    """The server has taken it, a while after it was given; its number is that of the trap."""
    REPLY = 7
    """The final one, given before the walk reached the recorded one, or when it had gone on from
    there."""
    NOTHING = 9
    """It was noted before it was known."""


_KIND_OF: dict[StepKind, EventKind] = {
    "began": EventKind.BEGAN,
    "resumed": EventKind.RESUMED,
    "thrown": EventKind.THROWN,
    "ended": EventKind.ENDED,
    "cut off": EventKind.CUT_OFF,
}
_STEP_OF: dict[EventKind, StepKind] = {kind: step for step, kind in _KIND_OF.items()}


class JournalEvent(NamedTuple):
    """One of them."""

    place: int
    time: int
    """By the clock of the recording; 0: that is not known."""
    vm: str
    """Its recorded name."""
    first: int
    """The trap that its request came with; for a trap itself, its own number."""
    kind: EventKind

    @property
    def step(self) -> Step | None:
        """As a recording has it; `None`: it is no step."""
        step = _STEP_OF.get(self.kind)
        return None if step is None else Step(self.vm, self.first, step)


class Journal:
    """See the module; that of one replay, of all VMs."""

    def __init__(self) -> None:
        self.vms: list[str] = []
        """The recorded names of those that are replayed."""
        self._numbers: dict[str, int] = {}
        """By their names of now, those that are played."""
        self._without_steps: set[str] = set()
        """The recorded names of those whose recording has none."""
        self._place: Callable[[], int] = int
        self._clock: Callable[[], int | None] = int
        self._events = bytearray()
        self._asked = bytearray()
        self._queued = bytearray()
        self._late = bytearray()
        self._restarts: set[tuple[str, int]] = set()
        self._ends: dict[str, int] = {}
        self._steps = Steps()
        self._pending: tuple[ReplayedRequest, int] | None = None
        """Whose handler has lined up, and perhaps begins at once; and the place."""
        self._going: tuple[ReplayedRequest, int] | None = None
        """Whose handler is about to go on, and where that is noted."""

    # --- while it is replayed -------------------------------------------------------

    def join(
        self,
        now: str,
        then: str,
        place: Callable[[], int],
        clock: Callable[[], int | None],
        *,
        has_steps: bool,
    ) -> None:
        """A VM is replayed, called `now`. `place`: of the message that is played, or is next;
        `clock`: the time of now by that of the recording."""
        self._place, self._clock = place, clock
        self._numbers[now] = len(self.vms)
        self.vms.append(then)
        if not has_steps:
            self._without_steps.add(then)

    def ask(self, request: ReplayedRequest) -> None:
        """The trap that is played is that of a request, which is asked."""
        request.place = self._place()
        if request.event.vm in self._numbers:
            _set(self._asked, request.place)

    def restart(self, request: ReplayedRequest) -> None:
        """The trap that asked again then is that of a new request now."""
        number = self._numbers.get(request.event.vm)
        if number is not None:
            self._flush()
            _set(self._asked, request.place)
            self._restarts.add((self.vms[number], request.first))

    def stop(self, now: str) -> None:
        """Nothing of a VM is played any more."""
        number = self._numbers.pop(now, None)
        if number is not None:
            self._ends[self.vms[number]] = self._place()

    def access(self, request: ReplayedRequest) -> int:
        """A handler has made an access to memory; returns the place."""
        self.add(request, EventKind.ACCESS)
        return self._place()

    def goes_on(self, request: ReplayedRequest) -> None:
        """A handler is about to go on; `step` follows when it does, and the walk may have gone on
        before."""
        if request.event.vm in self._numbers:
            self._going = request, len(self._events)
            self.add(request, EventKind.RESUMED)

    def forget(self, request: ReplayedRequest) -> None:
        """It has not gone on."""
        going = self._going
        if going is not None and going[0] is request:
            self._going = None
            self._events[going[1] + _KIND_AT] = EventKind.NOTHING

    def step(self, request: ReplayedRequest, step: StepKind) -> None:
        """A handler has made a step."""
        vm, first = request.event.vm, request.first
        number = self._numbers.get(vm)
        if step == "parked" or number is None or not self.has_steps(self.vms[number]):
            return
        if step == "queued":
            pending = self._pending
            if pending is not None and pending[0] is not request:
                self._flush()
            self._steps.step(vm, first, step)
            if self._steps.pending is not None:
                self._pending = request, self._place()
            return
        if step == "began":
            if self._pending is not None and self._pending[1] != self._place():
                self._flush()
            if not self._steps.step(vm, first, step):
                if self._steps.pending is None:
                    self._pending = None
                return
        going = self._going
        if step in ("resumed", "thrown") and going is not None and going[0] is request:
            self._going = None
            # It was noted before it was known which.
            self._events[going[1] + _KIND_AT] = _KIND_OF[step]
            return
        self.add(request, _KIND_OF[step])

    def take(self, request: ReplayedRequest, event: TrapEvent) -> None:
        """The server takes a trap: what has happened since it was given was before it."""
        self.add(request, EventKind.TRAP, seq=event.seq)

    def answer(self, request: ReplayedRequest) -> None:
        """A request is answered for good. Where the walk waits for that, its place is that of the
        recorded reply."""
        place = self._place()
        is_late = request.reply is not None and place > request.recorded_place
        if is_late or not request.over:
            self.add(request, EventKind.REPLY)
            request.reply_place = place
        if is_late and request.event.vm in self._numbers:
            _set(self._late, request.recorded_place)
        self._steps.lined_up.discard((request.event.vm, request.first))

    def add(
        self,
        request: ReplayedRequest,
        kind: EventKind,
        time: int | None = None,
        seq: int | None = None,
    ) -> None:
        """Something else has happened; `time`: by the clock of the recording, where not now; `seq`:
        of the trap, where not the first."""
        number = self._numbers.get(request.event.vm)
        if number is None:
            return
        self._flush()
        at = self._clock() if time is None else time
        self._events += _EVENT.pack(
            self._place(),
            min(max(at or 0, 0), _MAX_TIME),
            request.first if seq is None else seq,
            number,
            kind,
        )

    def _flush(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and self._steps.pending is not None:
            self._steps.flush()
            _set(self._queued, pending[0].place)

    # --- when it is written ---------------------------------------------------------

    def events(self) -> Iterator[JournalEvent]:
        """All of them, in their order."""
        for place, time, first, number, kind in _EVENT.iter_unpack(self._events):
            yield JournalEvent(place, time, self.vms[number], first, EventKind(kind))

    @property
    def has_waits(self) -> bool:
        """Whether a handler has waited for anything: then their order matters."""
        return any(
            kind in (EventKind.RESUMED, EventKind.THROWN)
            for *_, kind in _EVENT.iter_unpack(self._events)
        )

    def is_asked(self, place: int) -> bool:
        """Whether there is the trap of a request whose steps are those of now."""
        return _is_set(self._asked, place)

    def is_queued(self, place: int) -> bool:
        """Whether there is the trap of one whose handler has lined up."""
        return _is_set(self._queued, place)

    def is_restart(self, vm: str, seq: int) -> bool:
        """Whether a recorded retry is the first trap of a new request now; `vm`: as recorded."""
        return (vm, seq) in self._restarts

    def is_late(self, place: int) -> bool:
        """Whether there is the final reply of a request that was answered behind it now."""
        return _is_set(self._late, place)

    def has_steps(self, vm: str) -> bool:
        """Whether the recording of a VM, by its recorded name, has steps."""
        return vm not in self._without_steps

    def has_ended(self, vm: str, place: int) -> bool:
        """Whether nothing of the VM, by its recorded name, was played there any more."""
        return place >= self._ends.get(vm, place + 1)


def _set(bits: bytearray, place: int) -> None:
    byte = place >> 3
    if byte >= len(bits):
        bits += bytes(byte + 1 - len(bits) + len(bits) // 2)
    bits[byte] |= 1 << (place & 7)


def _is_set(bits: bytearray, place: int) -> bool:
    byte = place >> 3
    return byte < len(bits) and bool(bits[byte] >> (place & 7) & 1)
