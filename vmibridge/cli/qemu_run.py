"""`vmibridge qemu run`: QEMU with what traps need, and who answers them.

| `--via` | order | who listens |
|---|---|---|
| plugin | the host, then QEMU | the host, where QEMU's vCPUs connect |
| gdb | QEMU, halted; then the host | QEMU, where the host connects |
| device | the host, then QEMU | the host, where QEMU's device connects |
"""

import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import anyio
from cyclopts import Parameter

from vmibridge.backends import open_backend
from vmibridge.backends.device.arguments import device_arguments
from vmibridge.backends.device.backend import DeviceBackend
from vmibridge.backends.device.migration import blocker_arguments, write_blocker
from vmibridge.backends.qemu.find import (
    GDB_NEEDS,
    PLUGIN_NEEDS,
    accelerators,
    cache_folder,
    find_qemu,
    has_memory_backend,
    memory_size,
)
from vmibridge.backends.qemu.gdb.backend import QemuGdbBackend
from vmibridge.backends.qemu.plugin.build import kept_plugin
from vmibridge.backends.qemu.process import QemuProcess
from vmibridge.cli.event_loop import check_loop, logging_to, prints_beside, run_telling
from vmibridge.cli.logs import log_handler
from vmibridge.cli.options import HANDLERS, BackendOptions, bytes_of
from vmibridge.cli.outcome_file import OutcomeFile
from vmibridge.cli.output import StreamWriter, Writer, stream_writer
from vmibridge.cli.quiet_output import QuietWriter
from vmibridge.cli.server_options import ServerOptions
from vmibridge.cli.server_run import Life, Prepared, run_server
from vmibridge.cli.signals import exit_status, stop_at_hangup, stop_on_signals
from vmibridge.engine.server import BridgeServer
from vmibridge.errors import BackendError, ConfigError
from vmibridge.health.state import Health
from vmibridge.text import printable
from vmibridge.vm.backend import Backend

_AFTERWARDS = 2.0
"""Seconds in which the end of QEMU is expected to end the run."""
_PATIENCE, _MARGIN = 30.0, 10.0
"""Seconds that a host gets for a trap, by default; and how many more than `--timeout` at least."""
_QUITTING = 10.0
"""Seconds that QEMU has to end in, by its monitor and by SIGTERM."""
_KVM = "/dev/kvm"
_FOR_OLDER = {
    "plugin": "--via gdb works with older ones",
    "device": "the backend ivshmem: works with older ones, and so does --via gdb",
}
"""By `--via`, for a user whose QEMU is too old."""
_LISTENS = 10.0
"""Seconds in which QEMU is expected to listen."""
_YES, _NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
"""What cyclopts takes for a switch."""


def run_qemu(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="QEMU's own arguments, behind --.")
    ],
    handlers: Annotated[
        list[str] | None,
        HANDLERS,
        Parameter(help=f"{HANDLERS.help} Without, a host answers that listens at --socket."),
    ] = None,
    qemu: Annotated[
        str | None,
        Parameter(
            help="The QEMU to start; by default VMIBRIDGE_QEMU, that of"
            " vmibridge qemu fetch, or the one in PATH."
        ),
    ] = None,
    via: Annotated[
        Literal["plugin", "gdb", "device"],
        Parameter(
            help="The TCG plugin, for QEMU 11.1 and later; breakpoints, for any; or a PCI device,"
            " for 11.1 and later, also under KVM."
        ),
    ] = "plugin",
    accel: Annotated[
        Literal["tcg", "kvm"] | None,
        Parameter(
            help="The accelerator; tcg by default, with --via device kvm where it works. kvm does"
            " not go with --via plugin."
        ),
    ] = None,
    plugin: Annotated[
        Path | None, Parameter(help="The plugin; by default it is built and kept in the cache.")
    ] = None,
    socket: Annotated[
        Path | None, Parameter(help="Where host and QEMU meet; by default a path of its own.")
    ] = None,
    absent: Annotated[
        Literal["native", "skip", "wait"] | None,
        Parameter(
            help="Without a host: run instructions natively, which is the default, skip them, or"
            " wait for a host."
        ),
    ] = None,
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
            help="The selector of 32-bit code, for a QEMU that does not report the width of code."
        ),
    ] = None,
    plugin_options: Annotated[
        str, Parameter(help="Further arguments of the plugin: cpuid=off,verbose=on...")
    ] = "",
    share_memory: Annotated[
        bool,
        Parameter(negative=(), help="Keep guest memory in a file, for reads that need no trip."),
    ] = False,
    backend_options: BackendOptions = "",
    outcomes: Annotated[
        str | None,
        Parameter(
            help="The file where outcomes go; by default standard error. true: there; false: there,"
            " failures, one line a minute and the summary alone."
        ),
    ] = None,
    outcomes_max_size: Annotated[
        str | None,
        Parameter(
            help="Bytes that the file of --outcomes has at most, as in 64MiB; then it is renamed to"
            " FILE.1, in the place of the one before. None by default."
        ),
    ] = None,
    options: ServerOptions | None = None,
) -> int:
    """Start QEMU with what traps need, answer them until it ends, and take it down.

    QEMU has standard input and output. Ctrl-C answers what is pending and ends QEMU through
    its monitor.

    Exit status: that of a guest that exited, or of QEMU when it ended by itself; 1 when it could
    not be started or a handler module failed, 2 for wrong usage.

    Example: vmibridge qemu run --handlers vmibridge.handlers.hello -- -kernel vmlinuz -nographic
    """
    given = options or ServerOptions()
    if not handlers and (socket is None or given.reload):
        other = "" if given.reload else ", or the --socket where a host listens"
        raise ConfigError(f"give --handlers that answer{other}")
    _check_way(
        via,
        kvm="kvm" in (accel, *accelerators(arguments)),
        handlers=bool(handlers),
        of_plugin=bool(plugin_options) or {absent, patience, compat, plugin} != {None},
    )
    shown, outcome_file = _shown(outcomes)
    most_outcomes = _most_outcomes(outcome_file, outcomes_max_size)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmibridge-")))
        where = socket or folder / "vmi.sock"
        # The device has it shared by itself.
        shares = share_memory and via != "device"
        ram = stack.enter_context(_memory_file()) if shares else None
        found = find_qemu(qemu, GDB_NEEDS if via == "gdb" else PLUGIN_NEEDS, _FOR_OLDER.get(via))
        command = [found.path]
        asked = [backend_options] if backend_options else []
        backend: Backend | None = None
        if not accelerators(arguments):
            command += ["-accel", accel or (_best_accelerator() if via == "device" else "tcg")]
        if ram is not None:
            command += _shared_memory(ram, arguments)
        if via == "device":
            device = DeviceBackend.from_spec(f"unix:{where}", backend_options, "vm")
            device.qemu_goes_on = False
            backend = device
            size = None if has_memory_backend(arguments) else memory_size(arguments)
            command += device_arguments(where, device.options.timeout, size)
            write_blocker(folder / "image.vdi")
            command += blocker_arguments(folder / "image.vdi")
        elif via == "gdb":
            command += ["-S", "-gdb", f"unix:{_escaped(where)},server=on,wait=off"]
        else:
            if patience is None:
                patience = max(_PATIENCE, (given.timeout or 0) + _MARGIN)
            plugin_argument = _plugin_arguments(
                {
                    "file": _escaped(plugin or _built_plugin()),
                    "socket": _escaped(where),
                    "absent": absent or "native",
                    "patience": f"{patience:g}",
                    "compat": compat,
                    "ram": None if ram is None else _escaped(ram),
                },
                plugin_options,
            )
            command += ["-plugin", plugin_argument]
        process = QemuProcess([*command, *arguments])
        if not handlers:
            check_loop(given.loop)
            with logging_to(log_handler(given.log_level, None), given.log_level):
                health = Health()
                main = partial(_run_alone, process, health)
                return run_telling(given.loop, main, health, given.health_socket)
        lines = _outcome_writer(outcome_file, most_outcomes, stack, as_json=given.json)
        writer = lines if shown else QuietWriter(lines, as_json=given.json)
        if via == "gdb" and ram is not None:
            asked.append(f"ram={quote(str(ram))}")
        if via == "gdb" and not {"-D", "-d", "-trace", "--trace"} & {*arguments}:
            # QEMU's log is used by no one else, so it may show what others do by QMP.
            asked.append(f"stop-log={quote(str(folder / 'qemu.log'))}")
        spec = f"qemu-{via}:unix:{where}" + ("?" + "&".join(asked) if asked else "")
        return _serve(handlers, given, backend or open_backend(spec), writer, process)


def _check_way(via: str, *, kvm: bool, handlers: bool, of_plugin: bool) -> None:
    """Raises `ConfigError` for options that do not go together."""
    if via == "plugin" and kvm:
        raise ConfigError(
            "with KVM the plugin is loaded and never trapped to: use TCG, --via gdb or --via device"
        )
    if via == "gdb" and not handlers:
        raise ConfigError("--via gdb: the host connects to QEMU, so --handlers are needed here")
    if via != "plugin" and of_plugin:
        raise ConfigError(
            "--plugin, --absent, --patience, --compat and --plugin-options go with --via plugin"
            " only"
        )


def _best_accelerator() -> str:
    """KVM where this user may use it; else TCG. A line says which, and why or what changes it."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        sys.stderr.write(f"vmibridge: {_KVM}: {error.strerror}; QEMU runs under TCG\n")
        return "tcg"
    sys.stderr.write("vmibridge: QEMU runs under KVM; --accel tcg selects TCG\n")
    return "kvm"


def _plugin_arguments(given: Mapping[str, str | int | None], more: str) -> str:
    """As QEMU takes them: those that are given, and `more` as it is."""
    pairs = [f"{name}={value}" for name, value in given.items() if value is not None]
    return ",".join([*pairs, more] if more else pairs)


def _shared_memory(file: Path, arguments: Sequence[str]) -> list[str]:
    """Raises `ConfigError` beside a memory backend of the user: QEMU would take one of them."""
    if has_memory_backend(arguments):
        raise ConfigError(
            "--share-memory: QEMU's arguments have a memory backend of their own: leave one of them"
            " out, or name its file, by --plugin-options ram=FILE or, for gdb, --backend-options"
        )
    size = memory_size(arguments)
    backend = f"memory-backend-file,id=vmibridge-ram,size={size},mem-path={file},share=on"
    return ["-object", backend, "-machine", "memory-backend=vmibridge-ram"]


def _escaped(path: Path) -> str:
    """As a value among QEMU's options, where a comma is doubled."""
    return str(path.absolute()).replace(",", ",,")


def _built_plugin() -> Path:
    """The plugin of this source, which is built once."""
    cache = cache_folder()
    if cache is None:
        raise BackendError("there is no home folder to keep the plugin in: give --plugin FILE")
    return kept_plugin(cache, lambda why: sys.stderr.write(f"vmibridge: {printable(why)}\n"))


@contextmanager
def _memory_file() -> Iterator[Path]:
    """A file for guest memory, which takes room in memory alone."""
    shared = Path("/dev/shm")  # noqa: S108 - it is made with mode 0600, and no other name
    descriptor, name = tempfile.mkstemp(
        prefix="vmibridge-", suffix=".ram", dir=shared if shared.is_dir() else None
    )
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


async def _run_alone(qemu: QemuProcess, health: Health) -> int:
    """QEMU without a host here. SIGINT and SIGTERM end it through its monitor."""
    status, received = 0, list[int]()
    async with anyio.create_task_group() as tasks:

        def cancel(*_: object) -> None:
            health.stop_begins()
            tasks.cancel_scope.cancel()

        also = stop_at_hangup(cancel, received)
        await tasks.start(partial(stop_on_signals, exits=False), cancel, received, also)
        async with qemu:
            # Its monitor has answered: all that is asked of a command that answers no trap.
            health.add(tuple)
            status = await qemu.wait()
        tasks.cancel_scope.cancel()
    stopped = exit_status(received)
    return _exit_status(status) if stopped is None else stopped


def _serve(
    handlers: list[str],
    options: ServerOptions,
    backend: Backend,
    writer: Writer,
    qemu: QemuProcess,
) -> int:
    prepared = Prepared.of(handlers, options)
    contexts: list[AbstractAsyncContextManager[object]] = [*prepared.taps, backend, writer]
    with (
        prints_beside(json=options.json),
        logging_to(log_handler(options.log_level, None), options.log_level),
    ):
        server = prepared.server([backend])
        beside = partial(_run_qemu, qemu, server)
        if isinstance(backend, QemuGdbBackend):
            socket = Path(backend.where.removeprefix("unix:"))
            contexts = [qemu, _listening(qemu, socket), *contexts]
            beside = partial(_watch_gdb, qemu, server, backend)
        health = prepared.health(server)
        life = Life(
            contexts,
            server,
            writer,
            beside,
            reloader=prepared.reloader(server, health),
            bound=prepared.stop_bound(_QUITTING, partial(_end_now, qemu)),
            exit_zero=options.exit_zero,
            recorders=prepared.taps,
            health=health,
        )
        main = partial(run_server, life)
        status = run_telling(options.loop, main, health, options.health_socket)
    if life.exits.of:
        return status
    ended = qemu.process.returncode
    return status or _exit_status(0 if ended is None else ended)


@asynccontextmanager
async def _listening(qemu: QemuProcess, socket: Path) -> AsyncIterator[None]:
    """Wait until QEMU listens. Raises `BackendError` when it does not."""
    with anyio.move_on_after(_LISTENS):
        while not await anyio.Path(socket).is_socket():
            if qemu.process.returncode is not None:
                break
            await anyio.sleep(0.01)
    if qemu.process.returncode is not None:
        raise BackendError(f"QEMU ended with status {qemu.process.returncode}")
    yield


async def _run_qemu(qemu: QemuProcess, server: BridgeServer) -> None:
    """Its vCPUs connect before its monitor answers, so the server has to run by then."""
    async with qemu:
        await _watch(qemu, server)


async def _watch_gdb(qemu: QemuProcess, server: BridgeServer, backend: QemuGdbBackend) -> None:
    """The stub says nothing of a reset; the monitor does."""
    assert qemu.qmp is not None
    async with anyio.create_task_group() as tasks, qemu.qmp.events("RESET") as resets:
        tasks.start_soon(_watch, qemu, server)
        async for _ in resets:
            backend.was_reset()


def _end_now(qemu: QemuProcess) -> None:
    """From any thread: whoever would do it in good order does not come to it."""
    with suppress(AttributeError, ProcessLookupError):  # it was not started, or has ended
        os.kill(qemu.process.pid, signal.SIGTERM)


async def _watch(qemu: QemuProcess, server: BridgeServer) -> None:
    """QEMU's end is that of the run, also when no vCPU ever came."""
    await qemu.wait()
    await anyio.sleep(_AFTERWARDS)
    server.stop()


def _shown(outcomes: str | None) -> tuple[bool, Path | None]:
    """Whether each trap is shown, and the file; what says yes or no is none.

    Images set `VMIBRIDGE_OUTCOMES=false` for all commands, where others have a switch of that name.
    """
    if outcomes is None or outcomes.lower() in (*_YES, *_NO):
        return outcomes is None or outcomes.lower() in _YES, None
    return True, Path(outcomes)


def _most_outcomes(path: Path | None, size: str | None) -> int | None:
    most = bytes_of("--outcomes-max-size", size)
    if most is not None and path is None:
        raise ConfigError("--outcomes-max-size is about a file: give --outcomes FILE, too")
    return most


def _outcome_writer(
    path: Path | None, most: int | None, stack: ExitStack, *, as_json: bool
) -> StreamWriter:
    if path is None:
        return stream_writer(sys.stderr.fileno(), as_json=as_json)
    file = OutcomeFile(path, most)
    stack.callback(file.close)
    return stream_writer(file.fd, as_json=as_json, file=file)


def _exit_status(status: int) -> int:
    """As a shell tells it: 128 and its number for a signal."""
    return 128 - status if status < 0 else status
