"""`vmibridge run`: a guest, its handlers, and what is shown of them."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vmibridge.cli.options import OptionalSources, Outcomes, named_backend, no_option
from vmibridge.cli.server_options import ServerOptions
from vmibridge.errors import ConfigError


def run(
    *,
    backend: Annotated[
        list[str],
        Parameter(
            negative=(),
            help="The VM: unicorn:PATH?width=64&base=0x100000&memory=16MiB&vcpus=1."
            " NAME=SPEC names it. Several may be given: each has handlers of its own.",
        ),
    ],
    handlers: OptionalSources = None,
    answers: Annotated[
        Path | None,
        Parameter(
            allow_leading_hyphen=True,
            validator=no_option,
            help="Answer from this recording, in the place of handlers: a request gets what the"
            " same one got then.",
        ),
    ] = None,
    missing: Annotated[
        Literal["fail", "refuse", "native"] | None,
        Parameter(
            help="With --answers, what a request gets that is not in it: the fallback, and the"
            " status is 1; the fallback; or the instruction as if there were no host. fail by"
            " default."
        ),
    ] = None,
    until: Annotated[
        Literal["output", "exit"] | int | None,
        Parameter(
            help="End before the guest does: with the first output, when the guest has said EXIT"
            " (method 0xffff of the standard contract), or after so many traps: output, exit, N."
        ),
    ] = None,
    outcomes: Outcomes = True,
    options: ServerOptions | None = None,
) -> int:
    """Run a guest and answer its traps until it ends.

    On a terminal a table shows the latest traps and the counts; otherwise each trap
    is a line. Ctrl-C takes no more traps, answers what is pending, and lets the guest go;
    a second one leaves handlers no time to end, a third ends the process at once. SIGHUP, and
    with --reload a change of their files, loads the handlers again, without dropping a trap.

    Exit status: 0 when the guest ended by itself or at --until, what it exited with by the handler
    exit, 1 when it, its backend or a handler module failed, 2 for wrong usage.

    Example: vmibridge run --backend unicorn:guest.bin --handlers vmibridge.handlers.hello
    """
    from rich.console import Console

    from vmibridge.cli.answers import answer_sources, answers_of
    from vmibridge.cli.event_loop import logging_to, prints_beside, run_telling
    from vmibridge.cli.logs import log_handler
    from vmibridge.cli.output import TableWriter
    from vmibridge.cli.quiet_output import stdout_writer
    from vmibridge.cli.server_run import Life, Prepared, run_server

    given = options or ServerOptions()
    if isinstance(until, int) and until < 1:
        raise ConfigError(f"--until {until}: give output, exit, or a number of traps from 1")
    prepared = Prepared.of(answer_sources(handlers, answers, missing, given), given)
    backends = [
        each
        for number, text in enumerate(backend)
        for each in named_backend(text, f"vm{number}" if len(backend) > 1 else "vm").copies()
    ]
    console = Console() if outcomes and not given.json and sys.stdout.isatty() else None
    writer = (
        TableWriter(console) if console else stdout_writer(as_json=given.json, outcomes=outcomes)
    )
    with (
        prints_beside(json=given.json),
        logging_to(log_handler(given.log_level, console), given.log_level),
    ):
        recorded = answers_of(answers, missing, backends)
        server = prepared.server(backends, recorded)
        health = prepared.health(server)
        life = Life(
            [*prepared.taps, *backends, writer],
            server,
            writer,
            until=until,
            reloader=None if recorded else prepared.reloader(server, health),
            answers=recorded,
            bound=prepared.stop_bound(),
            exit_zero=given.exit_zero,
            recorders=prepared.taps,
            health=health,
        )
        main = partial(run_server, life)
        return run_telling(given.loop, main, life.health, given.health_socket)
