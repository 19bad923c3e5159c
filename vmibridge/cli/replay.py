"""`vmibridge replay`: the requests of recordings, asked again and compared."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter, validators

from vmibridge.cli.options import (
    CHECKS,
    RENAME,
    Json,
    Level,
    LoopOptions,
    OptionalOutput,
    Sources,
    no_option,
    renamed,
)
from vmibridge.cli.selection import RequestOptions
from vmibridge.cli.setting_options import setting
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError

_COMPARED = Group(
    "What is compared",
    help="All requests are replayed, so that handlers reach their recorded state; only these are"
    " compared."
    " What is given twice is an or; different options are an and.",
)
_RESULT = Group("What comes of it")
_SEQ = validators.Number(gte=0, lte=sys.maxsize)
_COUNT = validators.Number(gte=1, lte=sys.maxsize)


def replay(
    files: Annotated[
        list[Path],
        Parameter(
            allow_leading_hyphen=True,
            validator=no_option,
            help="Recordings, and folders of recordings; - is standard input.",
        ),
    ],
    /,
    *,
    handlers: Sources,
    vm: Annotated[
        list[str] | None,
        Parameter(group=_COMPARED, negative=(), help="Only this VM; may be given several times."),
    ] = None,
    requests: Annotated[RequestOptions | None, Parameter(group=_COMPARED)] = None,
    first: Annotated[
        int | None,
        Parameter(name="--from", group=_COMPARED, validator=_SEQ, help="From this trap of its VM."),
    ] = None,
    last: Annotated[
        int | None,
        Parameter(
            name="--to",
            group=_COMPARED,
            validator=_SEQ,
            help="To this trap of its VM; none behind it is asked.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Parameter(
            group=_COMPARED, validator=_COUNT, help="End after so many requests were compared."
        ),
    ] = None,
    fail_fast: Annotated[
        bool,
        Parameter(group=_COMPARED, negative=(), help="End after one that is different."),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        Parameter(
            group=_COMPARED,
            negative=(),
            help="Do not compare this: a field, output.id or another place in an output, a"
            " /REGEX/; or one of them of a request, as in 0x0300:value2. May be given several"
            " times; so may ignore in [replay] of --config, and replay_ignore of a handler.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        Parameter(
            group=_COMPARED,
            negative=(),
            help="The same memory accesses in the same order, no further call of vmi.outside, and"
            " nothing missing in the file.",
        ),
    ] = False,
    rename: Annotated[list[str] | None, RENAME] = None,
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
    no_outside: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Call no function of vmi.outside: what is not in the recording is refused.",
        ),
    ] = False,
    loop: LoopOptions | None = None,
    timeout: Annotated[float | None, setting(ServerSettings, "timeout", "as recorded")] = None,
    config: Annotated[
        Path | None,
        Parameter(
            help="A TOML file for [handlers.NAME] and [replay]; the server's settings are as"
            " recorded."
        ),
    ] = None,
    breaks: Annotated[
        list[str] | None,
        Parameter(
            name="--break",
            group=CHECKS,
            negative=(),
            help="Stop before the handler of this trap is asked, or before each for which an"
            " expression is true, as in 'request == 0x0100 and value1 > 5'. May be given several"
            " times.",
        ),
    ] = None,
    pdb: Annotated[
        bool,
        Parameter(group=CHECKS, negative=(), help="With --break: in pdb, in the handler."),
    ] = False,
    require: Annotated[
        str | None,
        Parameter(
            group=_RESULT,
            help="N%: fail where fewer of the selected requests could be compared.",
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        Parameter(
            group=_RESULT,
            allow_leading_hyphen=True,
            help="Write the result into this file, as JUnit XML.",
        ),
    ] = None,
    accept: Annotated[
        bool,
        Parameter(
            group=_RESULT,
            negative=(),
            help="Make a new recording, with the new answers of the compared requests that"
            " are different.",
        ),
    ] = False,
    output: Annotated[
        OptionalOutput,
        Parameter(group=_RESULT, help="The recording that --accept makes; - is standard output."),
    ] = None,
    json: Annotated[Json, Parameter(help="One JSON object a difference, then the counts.")] = False,
    log_level: Annotated[
        Literal[Level, "critical"],
        Parameter(
            group=CHECKS,
            help="What goes to standard error; error shows handlers that fail, debug shows"
            " tracebacks.",
        ),
    ] = "critical",
) -> int:
    """Ask handlers again what a recording was asked, and compare.

    The guest's memory is served from the recording. The first difference is shown with what
    led to it, then all of them in groups, the one that began first in front. Handlers run as they
    did then: files, databases and networks that they change are changed again, but for what they
    do by vmi.outside.

    Exit status: 0 when all is the same, or was accepted; 1 when something is different; 2 when
    nothing could be compared, or a recording could not be replayed.

    Example: vmibridge replay run.mcap --handlers vmibridge.handlers.hello
    """
    from vmibridge.cli.event_loop import check_loop, logging_to
    from vmibridge.cli.logs import log_handler
    from vmibridge.cli.pipes import STDOUT
    from vmibridge.cli.replay_break import Break
    from vmibridge.cli.replay_run import ReplayRun, recordings_in
    from vmibridge.recording.replay.options import ReplayOptions

    if accept != (output is not None):
        raise ConfigError("--accept makes a new recording: give -o FILE, too, and only with it")
    if junit is not None and str(junit).startswith("-"):
        raise ConfigError(f"--junit {str(junit)[:40]}: is to be the name of a file")
    if pdb and not breaks:
        raise ConfigError("--pdb says what to do at a --break: give one, too")
    chosen = (loop or LoopOptions()).loop
    check_loop(chosen)
    paths = recordings_in(files)
    if breaks and STDOUT in paths:
        raise ConfigError("--break is answered on standard input, which is the recording here")
    if accept and len(paths) > 1:
        raise ConfigError(f"--accept is for one recording, and there are {len(paths)}")
    vms = [*dict.fromkeys(vm or ())]
    run = ReplayRun(
        paths,
        ReplayOptions(speed, order, None, strict, "refuse" if no_outside else "call"),
        (requests or RequestOptions()).selection_of(vms, first, last),
        loop=chosen,
        renamed=renamed(rename or []),
        limit=limit,
        fail_fast=fail_fast,
        target=output,
        breaks=[Break(text) for text in breaks or ()],
        with_pdb=pdb,
        as_json=json,
    )
    least = None if require is None else _percent(require)
    with logging_to(log_handler(log_level, None), log_level):
        return run.run(handlers, config, ignore or [], timeout, least=least, junit=junit)


def _percent(text: str) -> float:
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise ConfigError(f"--require {text[:40]!r}: is not a share from above 0% to 100%")
    return percent
