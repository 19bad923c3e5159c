"""The commands, their options and their help."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter, validators

from vmibridge import __version__
from vmibridge.cli.selection import SelectionOptions
from vmibridge.errors import ConfigError

app = App(
    name="vmibridge",
    help="Answer what a virtual machine asks by one instruction with async Python handlers.",
    version=__version__,
)
handlers_app = App(name="handlers", help="Look at handlers.")
app.command(handlers_app)
qemu_app = App(name="qemu", help="What QEMU needs to be a backend.")
app.command(qemu_app)

_CHECKS = Group("Looking at what happens")
_RECORDING = Group("Recording")


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
    record: Annotated[
        Path | None, Parameter(group=_RECORDING, help="Record all that happens in this file.")
    ] = None,
    redact: Annotated[
        list[str] | None,
        Parameter(
            group=_RECORDING,
            negative=(),
            help="Leave out memory, value1 to value4, or one of them of one request, as in"
            " 0x0002:value3; may be given several times.",
        ),
    ] = None,
    unrecorded: Annotated[
        Literal["stop", "continue"] | None,
        Parameter(
            group=_RECORDING,
            help="When the file cannot be written any more: stop the run, or go on; stop by"
            " default.",
        ),
    ] = None,
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
            record=record,
            redact=redact or [],
            unrecorded=unrecorded,
            json=json,
            log_level=log_level,
        )
    )


@app.command
def recover(
    file: Annotated[Path, Parameter(help="A recording that was cut short or damaged.")],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o", help="The file to make.")],
    json: Annotated[
        bool, Parameter(group=_CHECKS, negative=(), help="What was kept, as one JSON object.")
    ] = False,
) -> int:
    """Make a clean recording of a damaged one, with all of it that can be read.

    Exit status: 0 when it was made, 2 when there is nothing to make it of.

    Example: vmibridge recover run.mcap -o clean.mcap
    """
    from vmibridge.cli.recover import recover_recording

    return recover_recording(file, output, as_json=json)


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
        Literal["debug", "info", "warning", "error", "critical"],
        Parameter(
            group=_CHECKS,
            help="What goes to standard error; error tells of handlers that fail, debug shows"
            " tracebacks.",
        ),
    ] = "critical",
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


@app.command
def inspect(
    file: Annotated[Path, Parameter(help="A recording.")],
    /,
    *,
    selection: SelectionOptions | None = None,
    limit: Annotated[
        int | None,
        Parameter(validator=validators.Number(gte=1), help="Stop after so many traps."),
    ] = None,
    full: Annotated[
        bool, Parameter(negative=(), help="Registers and accesses to memory, too.")
    ] = False,
    json: Annotated[
        bool, Parameter(negative=(), help="One JSON object a session and a trap, then a summary.")
    ] = False,
) -> int:
    """List the traps of a recording, in the order of their replies.

    Example: vmibridge inspect run.mcap --outcome failed --since 2.5
    """
    from vmibridge.cli.inspect import InspectOptions, inspect_recording

    chosen = (selection or SelectionOptions()).selection()
    return inspect_recording(InspectOptions(file, chosen, limit, json, full))


@app.command
def export(
    file: Annotated[Path, Parameter(help="A recording.")],
    /,
    *,
    to: Annotated[Literal["jsonl", "perfetto", "sqlite", "parquet"], Parameter(help="The format.")],
    output: Annotated[
        Path | None,
        Parameter(
            name=("--output", "-o"),
            allow_leading_hyphen=True,
            help="The file to make; by default FILE with another suffix. - is standard output,"
            " for jsonl.",
        ),
    ] = None,
    selection: SelectionOptions | None = None,
) -> int:
    """Write the traps of a recording in the format of another tool.

    Example: vmibridge export run.mcap --to sqlite -o run.sqlite
    """
    from vmibridge.cli.export import ExportOptions, export_recording

    chosen = (selection or SelectionOptions()).selection()
    return export_recording(ExportOptions(file, to, output, chosen))


@app.command
def report(
    file: Annotated[Path, Parameter(help="A recording.")],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(
            name=("--output", "-o"), help="The page to make; by default FILE with .html at its end."
        ),
    ] = None,
    limit: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=1, lte=500_000),
            help="Show so many traps, and of the rest the slowest and up to 1000 that failed;"
            " totals and latencies count all.",
        ),
    ] = 100_000,
    title: Annotated[str | None, Parameter(help="The heading of the page.")] = None,
    force: Annotated[
        bool, Parameter(negative=(), help="Write over a page that is there already.")
    ] = False,
) -> int:
    """Make one HTML page of a recording, which needs no network.

    Example: vmibridge report run.mcap -o report.html
    """
    from vmibridge.cli.report import ReportOptions, write_report

    return write_report(ReportOptions(file, output, limit, title, force))


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


@qemu_app.command(name="build-plugin")
def build_qemu_plugin(
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The file to make.")] = Path(
        "vmibridge-plugin.so"
    ),
    cc: Annotated[
        str | None, Parameter(help="The C compiler; cc, gcc or clang by default.")
    ] = None,
) -> int:
    """Compile the TCG plugin for QEMU 11.1 and later; needs a C compiler, no headers of QEMU.

    Exit status: 0 when it was built, 1 when there is no compiler or it failed.

    Example: vmibridge qemu build-plugin -o vmibridge-plugin.so
    """
    from vmibridge.cli.qemu import build

    return build(output, cc)


def _loop(
    async_backend: Literal["asyncio", "trio"], uvloop: bool
) -> Literal["asyncio", "uvloop", "trio"]:
    if not uvloop:
        return async_backend
    if async_backend == "trio":
        raise ConfigError("--uvloop: uvloop is for asyncio, so it does not go with trio")
    return "uvloop"
