"""The options of a command that runs a server; the same for each."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from cyclopts import Parameter

from vmibridge.cli.options import (
    RECORDING,
    REDACT,
    HealthSocket,
    Json,
    LogLevel,
    LoopOptions,
    bytes_of,
)
from vmibridge.cli.setting_options import setting
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError

if TYPE_CHECKING:
    from vmibridge.recording import Recorder

_OF_A_RECORDING = ("redact", "unrecorded", "record_max_size", "record_max_total")
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
            help="When the file cannot be written any more: stop the run, or go on; stop by"
            " default.",
        ),
    ] = None
    record_max_size: Annotated[
        str | None,
        Parameter(
            group=RECORDING,
            help="Bytes that a file of a recording has at most, as in 256MiB; then it goes on in"
            " another one. A quarter of --record-max-total by default, or none.",
        ),
    ] = None
    record_max_total: Annotated[
        str | None,
        Parameter(
            group=RECORDING,
            help="Bytes that all recordings of the folder have at most, as in 4GiB: the oldest ones"
            " that no process writes are removed; none by default.",
        ),
    ] = None
    json: Annotated[Json, Parameter(help="One JSON object a trap, then a summary.")] = False
    log_level: LogLevel = "info"
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
            record_max_size=None,
            record_max_total=None,
        )

    def recorder(self, *, stem: str = "run") -> "Recorder":
        """A recorder, as they say. Raises `ConfigError`, `MissingExtraError`."""
        from vmibridge.recording import Recorder

        assert self.record is not None, "asked for where records() is true"
        try:
            return Recorder(
                self.record,
                stem=stem,
                on_error=self.unrecorded or "stop",
                redact=self.redact,
                max_size=bytes_of("--record-max-size", self.record_max_size) or self._part_size,
                max_total=bytes_of("--record-max-total", self.record_max_total),
            )
        except ValueError as error:
            raise ConfigError(str(error).replace("max_", "--record-max-")) from error

    @property
    def _part_size(self) -> int | None:
        """Handlers that are reloaded have files of their own, of any size."""
        return _ANY_SIZE if self.reload and self.record_max_total is None else None

    def records(self, what: str = "FILE") -> bool:
        """Whether they ask for a recording, in `what`. Raises `ConfigError`."""
        if self.record is None:
            for name in _OF_A_RECORDING:
                if getattr(self, name):
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{option} is about a recording: give --record {what}, too")
        return self.record is not None
