"""Tell the guest the time of the host.

| method | value2 out |
|---|---|
| 0x0001 REAL | nanoseconds since the Unix epoch |
| 0x0002 MONOTONIC | nanoseconds, never fewer than this VM was told before |

Neither takes anything, and the status is success; of MONOTONIC only differences mean something.
Both are `vmi.time`: when the request came, so a guest that was told to wait gets a time that has
passed by then. A replay tells the recorded time.

The host reads its clock when the run begins, and counts on by one that is never set. So a clock
that is set meanwhile, or a host that sleeps, shows in no answer before the next run.
"""

from vmibridge import U64, BridgeContext, StandardHandler, method


class Clock(StandardHandler[int]):
    """Tells the time; the nanoseconds are its output."""

    REQUEST = 0x0114

    def __init__(self) -> None:
        self._latest = 0

    @method(0x0001)
    async def real(self, vmi: BridgeContext) -> U64:
        """The time of day, in nanoseconds since the Unix epoch."""
        return vmi.time

    @method(0x0002)
    async def monotonic(self, vmi: BridgeContext) -> U64:
        """A time that never goes back, in nanoseconds."""
        # Requests of several vCPUs may be answered in another order than they came in.
        self._latest = max(self._latest, vmi.time)
        return self._latest
