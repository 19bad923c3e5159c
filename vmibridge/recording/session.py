"""What a recording says of a VM before it runs: its session."""

import asyncio
import hashlib
import inspect
import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.messages import (
    RecordedArchitecture,
    RecordedHandler,
    RecordedMethod,
    Session,
    format_of,
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
) -> Session:
    """What is known of a VM before it runs."""
    told = RecordedArchitecture(architecture.name, architecture.version)
    return Session(
        vm,
        format=format_of(told),
        started=datetime.now(UTC).isoformat(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in ("vmibridge", "anyio", "msgspec")},
        },
        loop=_loop(),
        handlers=tuple(map(recorded_handler, bridge.handlers)),
        settings=settings,
        redaction=redaction.rules,
        architecture=told,
    )


def recorded_handler(handler: BridgeHandler[Any]) -> RecordedHandler:
    """What a recording keeps of a handler."""
    cls, contract = type(handler), handler.contract
    # The module of a file has the folder in its name, which does not belong in a recording.
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


@cache
def _version(package: str) -> str:
    # It is looked for on the disk, which takes a millisecond, on the loop.
    return version(package)


def _loop() -> str:
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        return "trio"
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
