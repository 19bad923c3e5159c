"""Which steps of handlers are recorded: those that are not plain without (`messages.Step`)."""

from vmibridge.engine.taps import Step as StepKind
from vmibridge.recording.messages import Step

__all__ = ["Steps"]


class Steps:
    """Those of one recording."""

    def __init__(self) -> None:
        self.pending: Step | None = None
        """That a handler was queued, where nothing else was recorded since: it may begin at once.
        To be recorded before anything else is (`flush`)."""
        self.lined_up: set[tuple[str, int]] = set()
        """Requests of which it is recorded. Who ends one takes it out."""

    def step(self, vm: str, first: int, kind: StepKind) -> list[Step]:
        """What to record of a step of the request that came with trap `first`."""
        key = (vm, first)
        pending = self.pending
        is_pending = pending is not None and (pending.vm, pending.seq) == key
        if kind == "queued":
            if is_pending or key in self.lined_up:
                return []
            told = [] if pending is None else [self.flush()]
            self.pending = Step(vm, first, "queued")
            return told
        if kind == "began":
            if is_pending:
                # It did not have to wait.
                self.pending = None
                return []
            if key not in self.lined_up:
                return []
            self.lined_up.discard(key)
        return [Step(vm, first, kind)]

    def flush(self) -> Step:
        """What is pending, which is recorded now."""
        pending, self.pending = self.pending, None
        assert pending is not None
        self.lined_up.add((pending.vm, pending.seq))
        return pending
