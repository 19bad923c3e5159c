"""The commands, their options and their help."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from vmibridge import __version__
from vmibridge.errors import ConfigError

app = App(
    name="vmibridge",
    help="Answer what a virtual machine asks by one instruction with async Python handlers.",
    version=__version__,
)
handlers_app = App(name="handlers", help="Look at handlers.")
app.command(handlers_app)

_CHECKS = Group("Looking at what happens")


@app.command
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
    handlers: Annotated[
        list[str],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Python files, folders or dotted modules that offer handlers.",
        ),
    ],
    async_backend: Annotated[
        Literal["asyncio", "trio"], Parameter(help="The event loop.")
    ] = "asyncio",
    timeout: Annotated[
        float | None,
        Parameter(help="Seconds for one request, where its handler says nothing; 5 by default."),
    ] = None,
    soft_timeout: Annotated[
        float | None,
        Parameter(help="Seconds until the guest is told to wait and ask again; none by default."),
    ] = None,
    config: Annotated[
        Path | None,
        Parameter(
            help="A TOML file: [server], [policy], [handlers.NAME]; see docs/configuration.md."
        ),
    ] = None,
    uvloop: Annotated[bool, Parameter(negative=(), help="asyncio on uvloop.")] = False,
    json: Annotated[
        bool, Parameter(group=_CHECKS, negative=(), help="One JSON object a trap, then a summary.")
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Parameter(group=_CHECKS, help="What goes to standard error; debug shows tracebacks."),
    ] = "info",
) -> int:
    """Run a guest and answer its traps until it ends.

    On a terminal a table shows the latest traps and the counts; otherwise each trap
    is a line. Ctrl-C takes no more traps, answers what is pending, and lets the guest go;
    a second one leaves handlers no time to end, a third ends the process at once.

    Exit status: 0 when the guest ended by itself, 1 when it, its backend or a handler
    module failed, 2 for wrong usage.

    Example: vmibridge run --backend unicorn:guest.bin --handlers handlers/hello.py
    """
    from vmibridge.cli.run import RunOptions, run_guest

    return run_guest(
        RunOptions(
            backends=backend,
            handlers=handlers,
            loop=_loop(async_backend, uvloop),
            timeout=timeout,
            soft_timeout=soft_timeout,
            config=config,
            json=json,
            log_level=log_level,
        )
    )


@app.command
def replay(
    file: Annotated[Path, Parameter(help="The recording.")],
    /,
    *,
    handlers: Annotated[
        list[str],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Python files, folders or dotted modules that offer handlers.",
        ),
    ],
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
    async_backend: Annotated[
        Literal["asyncio", "trio"], Parameter(help="The event loop.")
    ] = "asyncio",
    uvloop: Annotated[bool, Parameter(negative=(), help="asyncio on uvloop.")] = False,
    timeout: Annotated[
        float | None, Parameter(help="Seconds for one request; as recorded by default.")
    ] = None,
    config: Annotated[
        Path | None,
        Parameter(help="A TOML file for [handlers.NAME]; the server's settings are as recorded."),
    ] = None,
    json: Annotated[
        bool,
        Parameter(
            group=_CHECKS, negative=(), help="One JSON object a difference, then the counts."
        ),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Parameter(group=_CHECKS, help="What goes to standard error; debug shows tracebacks."),
    ] = "warning",
) -> int:
    """Ask handlers again what a recording was asked, and compare.

    The guest's memory is served from the recording. The first difference is shown with what
    led to it.

    Exit status: 0 when all is the same, 1 when something is different, 2 when nothing could
    be compared.

    Example: vmibridge replay run.mcap --handlers handlers/hello.py
    """
    from vmibridge.cli.replay import ReplayCommand
    from vmibridge.cli.replay import replay as replay_file

    return replay_file(
        ReplayCommand(
            file=file,
            handlers=handlers,
            vms=vm or [],
            speed=speed,
            order=order,
            strict=strict,
            loop=_loop(async_backend, uvloop),
            timeout=timeout,
            config=config,
            json=json,
            log_level=log_level,
        )
    )


@handlers_app.command(name="list")
def list_handlers(
    sources: Annotated[
        list[str], Parameter(help="Python files, folders or dotted modules that offer handlers.")
    ],
    /,
    *,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object a handler.")] = False,
) -> int:
    """Show each handler's contract and methods, without making any.

    Example: vmibridge handlers list handlers/
    """
    from vmibridge.cli.handlers import show_handlers

    return show_handlers(sources, as_json=json)


def _loop(
    async_backend: Literal["asyncio", "trio"], uvloop: bool
) -> Literal["asyncio", "uvloop", "trio"]:
    if not uvloop:
        return async_backend
    if async_backend == "trio":
        raise ConfigError("--uvloop: uvloop is for asyncio, so it does not go with trio")
    return "uvloop"
