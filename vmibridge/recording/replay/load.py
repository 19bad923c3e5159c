"""A recording as a load generator: the guest of an agent, whose server is measured.

    vmibridge agent --backend "web=replay:run.mcap?copies=8&loop=100" --connect unix:s.sock

Each copy is a VM of its own, and asks what was asked then: at the recorded pace with `speed=1`, or
as soon as what it waits for is answered. A time is from when a trap is put into the sink of the
agent until its answer is written to the guest.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vmibridge.errors import BackendSpecError
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

__all__ = ["LoadBackend", "LoadFigures", "LoadOptions", "LoadSummary"]

_clock = time.perf_counter
_DIGITS = 100
"""A time is counted with two digits: so any number of them takes some hundred counters."""


class LoadOptions(ReplayOptions, frozen=True, forbid_unknown_fields=True):
    """The options of a `replay:` spec."""

    copies: Annotated[int, Meta(ge=1, le=1000)] = 1
    """How many VMs ask it at the same time: NAME, NAME-2, NAME-3, ..."""
    loop: Annotated[int, Meta(ge=0)] = 1
    """How often it is played, one time after another; 0: until it is stopped."""


class LoadSummary(msgspec.Struct, frozen=True):
    """What came of a load."""

    traps: int
    """That were answered."""
    seconds: float
    """From the first trap to the last answer."""
    rate: float
    """Traps a second."""
    p50_ms: float
    """A half of the traps was answered within so many milliseconds."""
    p90_ms: float
    p99_ms: float
    max_ms: float
    compared: int
    """Requests whose answers were compared with those of the recording."""
    different: int


class LoadFigures:
    """Measures traps; those of several VMs may be summed up."""

    def __init__(self) -> None:
        self.began: float = math.inf
        self.ended: float = 0.0
        self.longest: float = 0.0
        self.times: Counter[int] = Counter()
        """Microseconds, with two digits."""
        self._sent: dict[int, float] = {}

    def sent(self, event: TrapEvent) -> None:
        """A trap was put into the sink."""
        now = _clock()
        self.began = min(self.began, now)
        self._sent[event.seq] = now

    def answered(self, event: TrapEvent) -> None:
        """It was answered."""
        since = self._sent.pop(event.seq, None)
        if since is None:
            return
        self.ended = now = _clock()
        taken = now - since
        self.longest = max(self.longest, taken)
        self.times[_rounded(int(taken * 1e6))] += 1

    @staticmethod
    def sum_up(backends: Iterable["LoadBackend"]) -> LoadSummary:
        """The figures of several VMs together."""
        several = list(backends)
        figures = [backend.figures for backend in several]
        times: Counter[int] = Counter()
        for each in figures:
            times.update(each.times)
        traps = times.total()
        began = min(each.began for each in figures)
        seconds = max(each.ended for each in figures) - began if traps else 0.0
        p50, p90, p99 = (_percentile(times, share) / 1000 for share in (0.5, 0.9, 0.99))
        return LoadSummary(
            traps,
            round(seconds, 6),
            round(traps / seconds, 1) if seconds else 0.0,
            p50,
            p90,
            p99,
            round(max(each.longest for each in figures) * 1000, 3),
            sum(backend.result.compared for backend in several),
            sum(backend.result.different for backend in several),
        )


class LoadBackend(ReplayBackend):
    """One VM of a recording, or several copies of it. Raises `BackendSpecError` as it does."""

    def __init__(
        self,
        path: Path,
        options: LoadOptions | None = None,
        vm: str = "vm",
        on_difference: Callable[[Difference], None] | None = None,
    ) -> None:
        self._given = given = options or LoadOptions()
        super().__init__(path, given, vm, on_difference)
        self.figures: LoadFigures = LoadFigures()

    def copies(self) -> Sequence[Backend]:
        """This one, and those beside it."""
        others = (f"{self.vm}-{number}" for number in range(2, self._given.copies + 1))
        return [self, *(LoadBackend(self.path, self._given, name) for name in others)]

    async def open(self) -> None:
        """Open the file and find the VM. Raises as that of a replay does."""
        await super().open()
        self.walk.source.play(self._given.loop)

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Play the recording to its end, as often as it is to be."""
        if self.options.outside == "refuse" and not self._traps.has_server:
            raise BackendSpecError(
                f"replay:{self.path}: outside=refuse: the handlers run elsewhere, and call what"
                " they like"
            )
        # With a server in this process it has taps, and nobody asks for figures.
        return await super().run(
            traps, sink if self._traps.has_server else _Measured(sink, self.figures)
        )

    def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> Coroutine[Any, Any, None]:
        """Take the answer. Raises `BackendError` for a trap that waits for none."""
        if not self._traps.has_server:
            self.figures.answered(event)
        return super().resume(event, writes)


class _Measured(TrapSink):
    """The sink, and what is put into it."""

    def __init__(self, sink: TrapSink, figures: LoadFigures) -> None:
        self._sink = sink
        self._figures = figures

    def put_nowait(self, event: TrapEvent) -> None:
        self._figures.sent(event)
        self._sink.put_nowait(event)

    async def put(self, event: TrapEvent) -> None:
        self._figures.sent(event)
        await self._sink.put(event)

    def abandon(self, event: TrapEvent) -> None:
        self._sink.abandon(event)


def _rounded(microseconds: int) -> int:
    unit = 1
    while microseconds >= _DIGITS * unit:
        unit *= 10
    return microseconds - microseconds % unit


def _percentile(times: Counter[int], share: float) -> float:
    left = share * times.total()
    for microseconds in sorted(times):
        left -= times[microseconds]
        if left <= 0:
            return microseconds
    return 0.0
