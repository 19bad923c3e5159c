"""What a server tells an agent when it takes it."""

from collections.abc import Iterable

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport.handshake import VERSION
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.session import Session
from vmibridge.transport.wire import Welcome, WireRead, milliseconds, wire_read
from vmibridge.vm.trap import TrapFilter


def welcome_to(
    session: Session,
    traps: TrapFilter,
    timeout: float,
    fallback: BridgeResponse[object],
    limits: AgentLimits,
    reads: Iterable[WireRead],
) -> Welcome:
    """The first frame of a server."""
    return Welcome(
        VERSION,
        session.incarnation,
        0,
        tuple(sorted(traps.magics)),
        traps.any_hypercall,
        traps.any_cpuid,
        milliseconds(timeout),
        fallback.values,
        limits.vcpus,
        tuple(reads),
        session.architecture.name,
        session.architecture.version,
    )


def highest_timeout(bridge: Bridge, settings: ServerSettings) -> float:
    """The highest hard deadline of any request, in seconds."""
    return max(
        (
            settings.terms(entry.target, method).timeout
            for entry in bridge.entries
            for method in (
                entry.handler.methods if entry.handler and entry.handler.methods else (0,)
            )
        ),
        default=settings.timeout,
    )


def declared_reads(bridge: Bridge) -> list[WireRead]:
    """The memory that the handlers of a bridge are known to read."""
    return [
        wire_read(entry.contract.magic, entry.contract.request, read)
        for entry in bridge.entries
        if entry.handler is not None
        for read in entry.handler.reads
    ]
