"""What a server asks of its engines, and the terms that one request is answered on.

Deadlines, the reply to wait, and the values that tell a retry can be set in three places:
what a `@method` says stands over what its handler says, and that over the server.

The server's soft deadline is for those alone that say `may_wait`. Most guests take WAIT for an
answer: of vmi-rs's guests only the two gates of `deploy` ask again, and a file transfer would
read it as a handle or as an abort.
"""

import math
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from vmibridge.bridge.bounds import Count, Seconds, Value, check_fields
from vmibridge.bridge.contract import STANDARD_WAIT
from vmibridge.bridge.dispatch import BridgeDispatch, Entry, Target
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.access_policy import Policy

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
    """The settings of a server: the one place of their names, defaults, bounds and meanings.

    The TOML file, the options of the commands and docs/configuration.md are made of it or held
    to it; so are the keywords of `BridgeServer`. Raises `ValueError` if a number is out of bounds.
    """

    timeout: Annotated[
        Seconds,
        Meta(
            description="the hard deadline of a request, from its first trap, where neither its"
            " handler nor its method has one: the handler is cancelled"
        ),
    ] = 5.0
    soft_timeout: Annotated[
        Seconds | None,
        Meta(
            description="the soft deadline of a trap, for handlers and methods that say `may_wait`:"
            " the guest gets WAIT, the handler goes on"
        ),
    ] = None
    wait: Annotated[
        BridgeResponse[Any], Meta(description="what the guest is told at the soft deadline")
    ] = STANDARD_WAIT
    """It gets the stamps of the handler."""
    retry_values: Annotated[
        tuple[Value, ...],
        Meta(description="which of value1 to value4 a retry has in common with its request"),
    ] = (1, 2, 3, 4)
    result_timeout: Annotated[
        Seconds,
        Meta(
            description="how long the result of a request that was told to wait is kept for its"
            " retry"
        ),
    ] = 60.0
    fallback: Annotated[
        BridgeResponse[Any],
        Meta(description="what the guest gets when a handler matched and did not answer"),
    ] = BridgeResponse()
    """By default its registers stay."""
    queue: Annotated[
        Count,
        Meta(
            description="traps of one VM that may be queued; a full queue holds the vCPU",
            extra={"unit": "traps"},
        ),
    ] = 256
    in_flight: Annotated[
        Count,
        Meta(
            description="handlers of one VM that may wait for something at a time, and results that"
            " are kept for it",
            extra={"unit": "handlers"},
        ),
    ] = 1024
    in_flight_total: Annotated[
        Count,
        Meta(
            description="handlers of all VMs that may wait for something at a time",
            extra={"unit": "handlers"},
        ),
    ] = 8192
    grace: Annotated[
        float,
        Meta(
            ge=0,
            description="the time that handlers which hold a vCPU have at a stop to end by"
            " themselves, at most half of `stop_timeout`",
            extra={"unit": "seconds"},
        ),
    ] = 1.0
    stop_timeout: Annotated[
        Seconds, Meta(description="the time in which a stop has to have answered every trap")
    ] = 5.0
    policy: Annotated[Policy | None, Meta(description="who may ask, and how much")] = None
    """`None`: anyone, any amount. In the file it is a table of its own."""
    handshake: Annotated[
        bool,
        Meta(description="answer the handshake, where the bridge speaks the standard contract"),
    ] = True
    blocked_after: Annotated[
        Seconds,
        Meta(
            description="the time after which a handler that holds up the event loop is reported,"
            " while it does, `inf`: never"
        ),
    ] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)

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
"""Where the keywords of `BridgeServer` take their defaults from."""


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

    def clear(self) -> None:
        """Handlers were reloaded: rows are worked out again, so that none keeps an old handler."""
        self._known.clear()
