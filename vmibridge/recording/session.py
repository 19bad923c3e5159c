"""What a recording says of a VM before it runs: its session."""

import asyncio
import hashlib
import inspect
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.messages import (
    FORMAT_WITH_STEPS,
    RecordedArchitecture,
    RecordedHandler,
    RecordedMethod,
    Session,
)
from vmibridge.recording.redaction import Redaction
from vmibridge.vm.arch.architecture import Architecture

__all__ = ["recorded_handler", "session_of"]


def session_of(
    vm: str,
    bridge: Bridge,
    settings: ServerSettings,
    redaction: Redaction,
    architecture: Architecture[Any],
    source: Source | None,
    epoch: int,
) -> Session:
    """What is known of a VM before it runs. `epoch`: when the clock of its messages was at 0."""
    told = RecordedArchitecture(architecture.name, architecture.version)
    return Session(
        vm,
        format=FORMAT_WITH_STEPS,
        started=datetime.now(UTC).isoformat(),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("vmibridge", "anyio", "msgspec")},
        },
        loop=_loop(),
        handlers=tuple(map(recorded_handler, bridge.handlers)),
        settings=settings,
        redaction=redaction.rules,
        architecture=told,
        seed=None if source is None else source.seed,
        clock=0 if source is None or source.wall_time is not None else source.epoch - epoch,
    )


def recorded_handler(handler: BridgeHandler[Any]) -> RecordedHandler:
    """What a recording keeps of a handler."""
    cls, contract = type(handler), handler.contract
    # The module of a file has the folder in its name, which is nobody's business.
    module = cls.__module__.rpartition("/")[2]
    source = digest = None
    try:
        file = Path(inspect.getfile(cls))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        source = file.name
    except (OSError, TypeError):
        # Made without a file, as at a prompt.
        pass
    return RecordedHandler(
        handler.name,
        f"{module}.{cls.__qualname__}",
        contract.request,
        contract.magic,
        contract.verify_values,
        tuple(RecordedMethod(each.code, each.name) for each in handler.methods.values()),
        source,
        digest,
    )


def _loop() -> str:
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        return "trio"
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
