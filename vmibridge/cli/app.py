"""The commands, their options and their help."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter, validators

from vmibridge import __version__
from vmibridge.cli.event_loop import chosen_loop
from vmibridge.cli.selection import SelectionOptions
from vmibridge.cli.server_options import ServerOptions

app = App(
    name="vmibridge",
    help="Answer what a virtual machine asks by one instruction with async Python handlers.",
    version=__version__,
)
handlers_app = App(name="handlers", help="Look at handlers.")
app.command(handlers_app)
recordings_app = App(name="recordings", help="Recordings kept in NATS (JetStream).")
app.command(recordings_app)
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
    options: ServerOptions | None = None,
) -> int:
    """Run a guest and answer its traps until it ends.

    On a terminal a table shows the latest traps and the counts; otherwise each trap
    is a line. Ctrl-C takes no more traps, answers what is pending, and lets the guest go;
    a second one leaves handlers no time to end, a third ends the process at once.

    Exit status: 0 when the guest ended by itself, 1 when it, its backend or a handler
    module failed, 2 for wrong usage.

    Example: vmibridge run --backend unicorn:guest.bin --handlers handlers/hello.py
    """
    from vmibridge.cli.run import run_guest

    return run_guest(backend, handlers, options or ServerOptions())


@app.command
def agent(
    *,
    backend: Annotated[
        str, Parameter(help="The VM, as for run. NAME=SPEC names it; by default as this machine.")
    ],
    connect: Annotated[
        str,
        Parameter(
            help="The server: unix:PATH, tcp:HOST:PORT, tls:HOST:PORT?cert=&key=&ca=, or any of"
            " those at nats://HOST:PORT; see docs/remote.md."
        ),
    ],
    deadline: Annotated[
        float | None,
        Parameter(
            help="Seconds that a vCPU waits for an answer at the most; by default a little"
            " longer than the server's own deadline."
        ),
    ] = None,
    async_backend: Annotated[
        Literal["asyncio", "trio"], Parameter(help="The event loop.")
    ] = "asyncio",
    uvloop: Annotated[bool, Parameter(negative=(), help="asyncio on uvloop.")] = False,
    json: Annotated[bool, Parameter(negative=(), help="The summary as one JSON object.")] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Parameter(help="What goes to standard error; debug shows tracebacks."),
    ] = "info",
) -> int:
    """Run a guest whose handlers are in a `vmibridge serve`, here or on another machine.

    The guest starts when the server has said which traps it wants. When the server is away,
    the agent tries to reach it again, and a vCPU that waits goes on at its deadline.

    Exit status: 0 when the guest ended by itself, 1 when it or its backend failed or the
    server refused the agent, 2 for wrong usage.

    Example: vmibridge agent --backend web=unicorn:guest.bin --connect unix:/run/vmibridge.sock
    """
    from vmibridge.cli.agent import AgentOptions, run_agent

    return run_agent(
        AgentOptions(
            backend,
            connect,
            chosen_loop(async_backend, uvloop=uvloop),
            deadline,
            json,
            log_level,
        )
    )


@app.command
def serve(
    *,
    listen: Annotated[
        list[str],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Where agents connect: unix:PATH?mode=0o600, tcp:127.0.0.1:PORT,"
            " tls:HOST:PORT?cert=&key=&ca=&names=, or nats://HOST:PORT, where servers share"
            " the traps; several may be given.",
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
    keep: Annotated[
        float, Parameter(help="Seconds that a VM is remembered whose agent is away.")
    ] = 300.0,
    repeated: Annotated[
        Literal["refuse", "run"],
        Parameter(
            help="A trap that a server which is gone may have run: give the guest its fallback,"
            " or run it."
        ),
    ] = "refuse",
    options: ServerOptions | None = None,
) -> int:
    """Answer the traps of VMs whose agents connect; each VM has handlers of its own.

    --record names a folder here: each VM has a file of its own in it.

    SIGHUP loads the handlers anew without dropping a trap. SIGINT and SIGTERM stop as with
    run; traps that come then are given back to their agents, for the server that follows.

    Exit status: 1 when it cannot listen or a handler module fails, 2 for wrong usage.

    Example: vmibridge serve --listen unix:/run/vmibridge.sock --handlers handlers/hello.py
    """
    from vmibridge.cli.serve import ServeOptions
    from vmibridge.cli.serve import serve as serve_agents

    return serve_agents(ServeOptions(listen, handlers, keep, repeated), options or ServerOptions())


@app.command
def health(
    where: Annotated[
        str | None,
        Parameter(
            env_var="VMIBRIDGE_HEALTH",
            help="Where somebody should listen: unix:PATH, tcp:HOST:PORT, tls:HOST:PORT or"
            " nats://HOST:PORT.",
        ),
    ] = None,
    /,
    *,
    within: Annotated[float, Parameter(help="Seconds until that counts as a failure.")] = 3.0,
) -> int:
    """Tell whether a host or a server listens: the health check of a container.

    Exit status: 0 when somebody listens, 1 when nobody does, 2 for wrong usage.

    Example: vmibridge health unix:/run/vmibridge/vmi.sock
    """
    from vmibridge.cli.health import check_health

    return check_health(where, within)


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
            loop=chosen_loop(async_backend, uvloop=uvloop),
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


@recordings_app.command(name="put")
def put_recording(
    file: Annotated[Path, Parameter(help="A recording that is finished.")],
    to: Annotated[str, Parameter(help="nats://HOST:PORT, with ?bucket= for another store.")],
    /,
    *,
    name: Annotated[
        str | None, Parameter(help="What to keep it as; the name of the file by default.")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="As one JSON object.")] = False,
) -> int:
    """Keep a recording in NATS.

    Exit status: 1 when it could not be kept, 2 for wrong usage.

    Example: vmibridge recordings put run.mcap nats://127.0.0.1:4222
    """
    from vmibridge.cli.recordings import put

    return put(file, to, name, as_json=json)


@recordings_app.command(name="get")
def get_recording(
    name: Annotated[str, Parameter(help="What it is kept as.")],
    source: Annotated[str, Parameter(help="nats://HOST:PORT, as with put.")],
    /,
    *,
    output: Annotated[
        Path | None, Parameter(alias="-o", help="The file to make; NAME, here, by default.")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="As one JSON object.")] = False,
) -> int:
    """Get a recording back.

    Exit status: 1 when it could not be got, 2 for wrong usage.

    Example: vmibridge recordings get run.mcap nats://127.0.0.1:4222 -o again.mcap
    """
    from vmibridge.cli.recordings import get

    return get(name, source, output, as_json=json)


@recordings_app.command(name="list")
def list_recordings(
    source: Annotated[str, Parameter(help="nats://HOST:PORT, as with put.")],
    /,
    *,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object a recording.")] = False,
) -> int:
    """List the recordings that are kept: bytes, name.

    Example: vmibridge recordings list nats://127.0.0.1:4222
    """
    from vmibridge.cli.recordings import show

    return show(source, as_json=json)


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


@qemu_app.command(name="run")
def run_qemu(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="QEMU's own arguments, behind --.")
    ],
    handlers: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Who answers: Python files, folders or dotted modules. Without, a host that"
            " listens at --socket.",
        ),
    ] = None,
    qemu: Annotated[
        str | None,
        Parameter(
            help="The QEMU to start; by default VMIBRIDGE_QEMU, .qemu/qemu-system-x86_64, or"
            " the one in PATH."
        ),
    ] = None,
    via: Annotated[
        Literal["plugin", "gdb"],
        Parameter(help="The TCG plugin, for QEMU 11.1 and later; or breakpoints, for any."),
    ] = "plugin",
    accel: Annotated[
        Literal["tcg", "kvm"] | None,
        Parameter(help="The accelerator, tcg by default; kvm goes with --via gdb alone."),
    ] = None,
    plugin: Annotated[
        Path | None, Parameter(help="The plugin; by default it is built and kept in the cache.")
    ] = None,
    socket: Annotated[
        Path | None, Parameter(help="Where host and QEMU meet; by default a path of its own.")
    ] = None,
    absent: Annotated[
        Literal["native", "skip", "wait"],
        Parameter(help="Without a host: run instructions natively, skip them, or wait for a host."),
    ] = "native",
    patience: Annotated[
        float | None,
        Parameter(
            help="Seconds that a host may take for a trap, and that a trap waits for a host; by"
            " default 30, or 10 more than --timeout."
        ),
    ] = None,
    compat: Annotated[
        int | None,
        Parameter(
            help="The selector of 32-bit code, for a QEMU that does not tell the width of code."
        ),
    ] = None,
    plugin_options: Annotated[
        str, Parameter(help="Further arguments of the plugin: cpuid=off,verbose=on...")
    ] = "",
    share_memory: Annotated[
        bool,
        Parameter(negative=(), help="Keep guest memory in a file, for reads that need no trip."),
    ] = False,
    backend_options: Annotated[
        str, Parameter(help="Further options of the backend, as in a spec: site=0x1000&...")
    ] = "",
    outcomes: Annotated[
        Path | None, Parameter(help="Where outcomes go; by default to standard error.")
    ] = None,
    options: ServerOptions | None = None,
) -> int:
    """Start QEMU with what traps need, answer them until it ends, and take it down.

    QEMU has standard input and output. Ctrl-C answers what is pending and ends QEMU through
    its monitor.

    Exit status: that of QEMU when it ended by itself, 1 when it could not be started or a
    handler module failed, 2 for wrong usage.

    Example: vmibridge qemu run --handlers handlers/hello.py -- -m 512 -kernel vmlinuz -nographic
    """
    from vmibridge.cli.qemu_run import QemuOptions, run_qemu_guest

    return run_qemu_guest(
        QemuOptions(
            arguments=arguments,
            handlers=handlers or [],
            qemu=qemu,
            via=via,
            accel=accel,
            plugin=plugin,
            socket=socket,
            absent=absent,
            patience=patience,
            compat=compat,
            plugin_options=plugin_options,
            share_memory=share_memory,
            backend_options=backend_options,
            outcomes=outcomes,
        ),
        options or ServerOptions(),
    )
