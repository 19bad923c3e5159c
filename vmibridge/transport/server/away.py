"""Agents that are away: their VMs are kept for a while, and then given up."""

from collections.abc import Callable, Iterable

from vmibridge.aio.listening import sleep_late
from vmibridge.transport.session import Session


async def give_up_agents(sessions: Callable[[], Iterable[Session]], keep: float) -> None:
    """Give up each of `sessions` whose agent has been away for `keep` seconds. Until cancelled.

    Nothing wakes this when a connection is lost: it looks every second, or four times in `keep`.
    """
    while True:
        late = await sleep_late(min(keep / 4, 1.0))
        # A copy: to give one up may change what the caller has.
        for session in list(sessions()):
            session.give_up_agent(keep, late)
