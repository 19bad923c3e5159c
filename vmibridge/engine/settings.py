"""What a server asks of its engines, and the terms that one request is answered on.

Deadlines, the reply to wait, and the values that tell a retry can be set in three places:
what a `@method` says stands over what its handler says, and that over the server.

The server's soft deadline is for those alone that say `may_wait`. Most guests take WAIT for an
answer: of vmi-rs's guests only the two gates of `deploy` ask again, and a file transfer would
read it as a handle or as an abort.
"""

import math
from typing import Any, NamedTuple

import msgspec

from vmibridge.bridge.contract import STANDARD_WAIT
from vmibridge.bridge.dispatch import BridgeDispatch, Entry, Target
from vmibridge.bridge.handler import check_retry_values, check_timeout
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.policy import Policy

__all__ = ["ServerSettings"]


class Terms(NamedTuple):
    """What holds for one method of one handler."""

    timeout: float
    """Seconds from taking the first trap to the hard deadline."""
    soft_timeout: float
    """Seconds from taking each trap to its soft deadline; infinite: there is none."""
    wait: BridgeResponse[Any]
    """What the guest gets at the soft deadline, before stamps."""
    retry_values: tuple[int, ...]
    """The values that a retry has in common with its request."""


class ServerSettings(msgspec.Struct, frozen=True):
    """The settings of a server. Raises `ValueError` for what makes no sense."""

    timeout: float = 5.0
    """Seconds to the hard deadline of one request: the handler is cancelled."""
    soft_timeout: float | None = None
    """Seconds to the soft deadline of one trap, for handlers and methods that say `may_wait`:
    the guest gets WAIT, and the handler goes on. `None`: none."""
    wait: BridgeResponse[Any] = STANDARD_WAIT
    """What a guest is told at the soft deadline; it gets the stamps of the handler."""
    retry_values: tuple[int, ...] = (1, 2, 3, 4)
    """Which of value1 to value4 a retry has in common with its request."""
    result_timeout: float = 60.0
    """Seconds that the result of a request that was told to wait is kept for its retry."""
    fallback: BridgeResponse[Any] = BridgeResponse()
    """What the guest gets when a handler did not answer; by default its registers stay."""
    queue: int = 256
    """Traps of one VM that may be queued; a full queue holds the vCPU."""
    in_flight: int = 1024
    """Handlers that may wait for something at a time, for one VM; also the results kept."""
    in_flight_total: int = 8192
    """The same for all VMs of the server together."""
    grace: float = 1.0
    """Seconds that handlers have at a stop to end by themselves, when a trap waits for
    them; at most half of `stop_timeout`."""
    stop_timeout: float = 5.0
    """Seconds in which a stop has to have answered every trap."""
    policy: Policy | None = None
    """Who may ask, and how much; `None`: anyone, any amount."""
    handshake: bool = True
    """Answer the handshake, where the bridge speaks the standard contract."""
    blocked_after: float = 0.5
    """Seconds after which a handler that holds up the event loop is reported; infinite: never."""

    def __post_init__(self) -> None:
        check_timeout(self.timeout)
        check_timeout(self.soft_timeout, "soft_timeout")
        check_timeout(self.result_timeout, "result_timeout")
        check_timeout(self.stop_timeout, "stop_timeout")
        check_timeout(self.blocked_after, "blocked_after")
        check_retry_values(self.retry_values)
        if not self.grace >= 0:
            raise ValueError(f"grace is a number of seconds from 0, got {self.grace!r}")
        if self.queue < 1:
            raise ValueError(f"queue holds at least one trap, got {self.queue!r}")
        for name in ("in_flight", "in_flight_total"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least one, got {getattr(self, name)!r}")

    def terms(self, target: Target, method: int) -> Terms:
        """What holds for a method code of a handler, or for a dispatcher of another kind."""
        timeout: float | None = None
        soft_timeout: float | None = None
        may_wait: bool | None = None
        wait: BridgeResponse[Any] | None = None
        retry_values: tuple[int, ...] | None = None
        if isinstance(target, BridgeDispatch):
            may_wait = target.may_wait
        else:
            for place in (target, target.methods.get(method)):
                if place is None:
                    continue
                timeout = timeout if place.timeout is None else place.timeout
                soft_timeout = soft_timeout if place.soft_timeout is None else place.soft_timeout
                may_wait = may_wait if place.may_wait is None else place.may_wait
                wait = wait if place.wait is None else place.wait
                retry_values = retry_values if place.retry_values is None else place.retry_values
        if soft_timeout is None and may_wait:
            soft_timeout = self.soft_timeout
        if soft_timeout is None:
            soft_timeout = math.inf
        return Terms(
            self.timeout if timeout is None else timeout,
            soft_timeout,
            self.wait if wait is None else wait,
            self.retry_values if retry_values is None else retry_values,
        )


DEFAULTS = ServerSettings()
"""Where the keywords of `BridgeServer` and the keys of the TOML file take their defaults from."""


class TermsTable:
    """The terms of each method of each handler, worked out once."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._known: dict[tuple[Entry, int | None], Terms] = {}

    def of(self, entry: Entry, method: int) -> Terms:
        """The terms of a method code, of which a guest may make up any number."""
        handler = entry.handler
        # Codes that the handler does not name have its own terms in common: one row for all of
        # them, so that a guest cannot grow the table.
        known = None if handler is None or method not in handler.methods else method
        terms = self._known.get((entry, known))
        if terms is None:
            terms = self._known[entry, known] = self._settings.terms(entry.target, method)
        return terms
