"""The options of a command that runs a server; the same for each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vmibridge.cli.options import CHECKS, RECORDING, AsyncBackend, Loop, Uvloop, chosen_loop


@Parameter(name="*")
@dataclass(frozen=True)
class ServerOptions:
    """As given."""

    async_backend: AsyncBackend = "asyncio"
    timeout: Annotated[
        float | None,
        Parameter(help="Seconds for one request, where its handler says nothing; 5 by default."),
    ] = None
    soft_timeout: Annotated[
        float | None,
        Parameter(help="Seconds until the guest is told to wait and ask again; none by default."),
    ] = None
    config: Annotated[
        Path | None,
        Parameter(
            help="A TOML file: [server], [policy], [handlers.NAME]; see docs/configuration.md."
        ),
    ] = None
    uvloop: Uvloop = False
    record: Annotated[
        Path | None,
        Parameter(
            group=RECORDING,
            help="Record all that happens in this new file; in a folder, it gets a free name.",
        ),
    ] = None
    redact: Annotated[
        list[str],
        Parameter(
            group=RECORDING,
            negative=(),
            show_default=False,
            help="Leave out memory, value1 to value4, or one of them of one request, as in"
            " 0x0002:value3; may be given several times.",
        ),
    ] = field(default_factory=list)
    unrecorded: Annotated[
        Literal["stop", "continue"] | None,
        Parameter(
            group=RECORDING,
            help="When the file cannot be written any more: stop the run, or go on; stop by"
            " default.",
        ),
    ] = None
    json: Annotated[
        bool, Parameter(group=CHECKS, negative=(), help="One JSON object a trap, then a summary.")
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Parameter(group=CHECKS, help="What goes to standard error; debug shows tracebacks."),
    ] = "info"

    @property
    def loop(self) -> Loop:
        """Raises `ConfigError` for what does not go together."""
        return chosen_loop(self.async_backend, uvloop=self.uvloop)
