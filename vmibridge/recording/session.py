"""What a recording says of a VM before it runs: its session."""

import asyncio
import hashlib
import inspect
import platform
import re
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import msgspec

from vmibridge.bridge.context import Source
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.made_with import made_with
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.messages import (
    FORMAT_WITH_PLAIN,
    RecordedArchitecture,
    RecordedHandler,
    RecordedMethod,
    Session,
)
from vmibridge.recording.project_modules import project_modules
from vmibridge.recording.redaction import Redaction
from vmibridge.text import repr_of
from vmibridge.vm.arch.architecture import Architecture

__all__ = ["LEFT_OUT", "recorded_handler", "session_of", "settings_text"]

LEFT_OUT = "left out"
"""In the place of a setting that is not recorded."""
_SECRET = re.compile("secret|passw|token|credential|private|api_?key|auth", re.IGNORECASE)
"""In the names of settings that are not recorded."""
_MAX_SETTINGS = 65_536
"""Characters."""


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
        format=FORMAT_WITH_PLAIN,
        started=datetime.now(UTC).isoformat(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in ("vmibridge", "anyio", "msgspec")},
        },
        loop=loop_name(),
        handlers=tuple(
            recorded_handler(handler, with_settings=not redaction.hides_settings(handler.REQUEST))
            for handler in bridge.handlers
        ),
        settings=settings,
        redaction=redaction.of_traps,
        architecture=told,
        seed=None if source is None else source.seed,
        clock=0 if source is None or source.wall_time is not None else source.epoch - epoch,
    )


def recorded_handler(handler: BridgeHandler[Any], *, with_settings: bool = True) -> RecordedHandler:
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
        settings_text(handler) if with_settings else None,
        project_modules(cls.__module__),
    )


@cache
def _version(package: str) -> str:
    # It is looked for on the disk, which takes a millisecond, on the loop.
    return version(package)


def settings_text(handler: BridgeHandler[Any]) -> str | None:
    """The settings that a handler was made with, as JSON, without what looks like a secret.

    `None`: it has none, or they are not known, or are more than a recording keeps.
    """
    settings = made_with(handler)
    if settings is None:
        return None
    try:
        data = msgspec.to_builtins(settings, enc_hook=repr_of, str_keys=True)
        text = msgspec.json.encode(_without_secrets(data), order="deterministic").decode()
    except BaseException:  # whatever a value of them raises
        return None
    return text if len(text) <= _MAX_SETTINGS else None


def _without_secrets(value: object, depth: int = 32) -> object:
    if not depth:
        return LEFT_OUT
    if isinstance(value, dict):
        return {
            name: LEFT_OUT if _SECRET.search(name) else _without_secrets(each, depth - 1)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(each, depth - 1) for each in value]
    return value


def loop_name() -> str:
    """What a recording calls the running loop: asyncio, trio or uvloop."""
    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        return "trio"
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
