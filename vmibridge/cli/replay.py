"""`vmibridge replay`: the requests of a recording, asked again and compared."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vmibridge.cli.options import (
    CHECKS,
    Json,
    Level,
    LoopOptions,
    Recording,
    Sources,
)
from vmibridge.cli.setting_options import setting
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import (
    BackendSpecError,
    NotReplayedError,
    RecordingReadError,
    VmiBridgeError,
)


def replay(
    file: Recording,
    /,
    *,
    handlers: Sources,
    vm: Annotated[
        list[str] | None, Parameter(negative=(), help="Only this VM; may be given several times.")
    ] = None,
    speed: Annotated[
        float, Parameter(help="1: as fast as it was; N: N times as fast; 0: without waiting.")
    ] = 0.0,
    order: Annotated[
        Literal["recorded", "vcpu"],
        Parameter(
            help="What a trap waits for: every reply that was recorded before it, or those of"
            " its vCPU."
        ),
    ] = "recorded",
    strict: Annotated[
        bool,
        Parameter(
            negative=(),
            help="The same memory accesses in the same order, and nothing missing in the file.",
        ),
    ] = False,
    loop: LoopOptions | None = None,
    timeout: Annotated[float | None, setting(ServerSettings, "timeout", "as recorded")] = None,
    config: Annotated[
        Path | None,
        Parameter(help="A TOML file for [handlers.NAME]; the server's settings are as recorded."),
    ] = None,
    json: Annotated[Json, Parameter(help="One JSON object a difference, then the counts.")] = False,
    log_level: Annotated[
        Literal[Level, "critical"],
        Parameter(
            group=CHECKS,
            help="What goes to standard error; error tells of handlers that fail, debug shows"
            " tracebacks.",
        ),
    ] = "critical",
) -> int:
    """Ask handlers again what a recording was asked, and compare.

    The guest's memory is served from the recording. The first difference is shown with what
    led to it. Handlers run as they did then: files, databases and networks that they change are
    changed again.

    Exit status: 0 when all is the same, 1 when something is different, 2 when nothing could
    be compared.

    Example: vmibridge replay run.mcap --handlers handlers/hello.py
    """
    from vmibridge.aio.clock import VirtualTime
    from vmibridge.cli.event_loop import check_loop, logging_to, run_on
    from vmibridge.cli.logs import log_handler
    from vmibridge.cli.replay_run import Replay, sessions_of
    from vmibridge.recording.replay.options import ReplayOptions

    chosen = (loop or LoopOptions()).loop
    check_loop(chosen)
    sessions = sessions_of(file)
    names: list[str | None] = (
        [*dict.fromkeys(vm or ())] or [session.vm for session in sessions] or [None]
    )
    options = [ReplayOptions(speed, order, name, strict) for name in names]
    run = Replay(file, options, {session.vm: session for session in sessions}, as_json=json)
    with logging_to(log_handler(log_level, None), log_level):
        try:
            compare = partial(run.compare, handlers, config, timeout)
            return run_on(chosen, compare, VirtualTime(speed))
        except (RecordingReadError, BackendSpecError):
            raise
        except VmiBridgeError as error:
            raise NotReplayedError(str(error)) from error
