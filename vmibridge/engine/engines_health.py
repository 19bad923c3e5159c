"""The health of the engines of one server and of its taps, as reasons."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from vmibridge.bridge.dispatch import one_line
from vmibridge.engine.engine import Engine
from vmibridge.engine.taps import Hindrance
from vmibridge.errors import VmiBridgeError
from vmibridge.health.state import Check, Code, Reason

__all__ = ["health_of", "reasons_of"]

_CODES: Mapping[str, Code] = MappingProxyType(
    {"disk full": "disk-full", "not recording": "not-recording"}
)


def health_of(engines: Mapping[str, Engine], kept: Sequence[str]) -> list[Reason]:
    """Why a trap of these VMs would not be answered now. `kept`: those whose handlers could not be
    reloaded."""
    phases = {vm: engine.phase for vm, engine in engines.items()}
    found = [
        Reason("starting", f"vm {vm}: its handlers are being entered", "started")
        for vm, phase in phases.items()
        if phase == "starting"
    ]
    if not {"starting", "serving"} & {*phases.values()}:
        found.append(Reason("stopping", "every guest has ended, or is stopped"))
    else:
        # One of several: the others are served.
        found += [
            Reason("vm-failed", f"vm {vm}: {_text_of(engine.error)}")
            for vm, engine in engines.items()
            if engine.error is not None
        ]
    found += [Reason("reload-failed", f"vm {vm}: keeps its handlers", None) for vm in kept]
    return found


def _text_of(error: BaseException) -> str:
    return str(error) if isinstance(error, VmiBridgeError) else one_line(error)


def reasons_of(hindrance: Hindrance | None) -> list[Reason]:
    """A tap that cannot do its work. Where guests go on without it, as its user has chosen, they
    are answered, and the server is ready."""
    if hindrance is None:
        return []
    fails: Check | None = "ready" if hindrance.holds_guests else None
    return [Reason(_CODES[hindrance.kind], hindrance.why, fails)]
