"""The options of a command that runs a server; the same for each."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from cyclopts import Parameter

from vmibridge.cli.options import (
    RECORDING,
    REDACT,
    ExitZero,
    HealthSocket,
    Json,
    LogLevel,
    LoopOptions,
)
from vmibridge.cli.rotation_options import keep_of, rotate_of
from vmibridge.cli.setting_options import setting
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError

if TYPE_CHECKING:
    from vmibridge.recording import Recorder

_OF_A_RECORDING = ("redact", "unrecorded", "rotate", "keep")
_NAMES = {
    "max_size": "--rotate",
    "max_age": "--rotate",
    "max_total": "--keep",
    "max_files": "--keep",
}
_ANY_SIZE = 1 << 62
"""Bytes: more than any file has."""


@Parameter(name="*")
@dataclass(frozen=True)
class ServerOptions(LoopOptions):
    """As given. Those that have the name of a setting stand over the one of the file."""

    timeout: Annotated[float | None, setting(ServerSettings, "timeout")] = None
    soft_timeout: Annotated[float | None, setting(ServerSettings, "soft_timeout")] = None
    config: Annotated[
        Path | None,
        Parameter(
            help="A TOML file: [server], [policy], [handlers.NAME]; see docs/configuration.md."
        ),
    ] = None
    reload: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Load the handlers again when one of their files has changed, as at SIGHUP.",
        ),
    ] = False
    record: Annotated[
        Path | None,
        Parameter(
            group=RECORDING,
            help="Record all that happens in this new file; in a folder, it gets a free name.",
        ),
    ] = None
    redact: Annotated[list[str], REDACT] = field(default_factory=list)
    unrecorded: Annotated[
        Literal["stop", "continue"] | None,
        Parameter(
            group=RECORDING,
            help="When the file cannot be written: stop, or continue without. stop, the default,"
            " holds the guests while the volume is full, and ends the run for any other reason.",
        ),
    ] = None
    rotate: Annotated[
        list[str],
        Parameter(
            group=RECORDING,
            negative=(),
            show_default=False,
            help="The most that a file of a recording has, as in 256M or 1h; then it goes on in"
            " another one. May be given as both; a quarter of the size of --keep by default.",
        ),
    ] = field(default_factory=list)
    keep: Annotated[
        list[str],
        Parameter(
            group=RECORDING,
            negative=(),
            show_default=False,
            help="How many recordings, as in 10, or how much of them, as in 2G, the folder has at"
            " most: the oldest ones that no process writes are removed. May be given as both.",
        ),
    ] = field(default_factory=list)
    json: Annotated[Json, Parameter(help="One JSON object a trap, then a summary.")] = False
    log_level: LogLevel = "info"
    exit_zero: ExitZero = False
    health_socket: HealthSocket = None

    @property
    def settings(self) -> dict[str, object]:
        """The settings of a server among them, by name; `None`: not given."""
        names = ServerSettings.__struct_fields__
        return {name: value for name, value in vars(self).items() if name in names}

    def without_recording(self) -> Self:
        """The same, without what is about a recording."""
        return replace(
            self,
            record=None,
            redact=[],
            unrecorded=None,
            rotate=[],
            keep=[],
        )

    def recorder(self, *, stem: str = "run") -> "Recorder":
        """A recorder, as they say. Raises `ConfigError`, `MissingExtraError`."""
        from vmibridge.recording import Recorder

        assert self.record is not None, "asked for where records() is true"
        (size, age), (total, files) = rotate_of(self.rotate), keep_of(self.keep)
        if self.reload and size is total is None:
            # Handlers that are reloaded have files of their own, of any size.
            size = _ANY_SIZE
        try:
            return Recorder(
                self.record,
                stem=stem,
                on_error=self.unrecorded or "stop",
                redact=self.redact,
                max_size=size,
                max_age=age,
                max_total=total,
                max_files=files,
            )
        except ValueError as error:
            text = re.sub("|".join(_NAMES), lambda match: _NAMES[match[0]], str(error))
            raise ConfigError(text) from error

    def records(self, what: str = "FILE") -> bool:
        """Whether they ask for a recording, in `what`. Raises `ConfigError`."""
        if self.record is None:
            for name in _OF_A_RECORDING:
                if getattr(self, name):
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{option} is about a recording: give --record {what}, too")
        return self.record is not None
