"""`vmibridge qemu run`: QEMU with what traps need, and who answers them.

| `--via` | order | who listens |
|---|---|---|
| plugin | the host, then QEMU | the host, where QEMU's vCPUs connect |
| gdb | QEMU, halted; then the host | QEMU, where the host connects |
"""

import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import anyio
from anyio.abc import TaskStatus

from vmibridge.backend import open_backend
from vmibridge.backend.qemu_gdb.backend import QemuGdbBackend
from vmibridge.backend.qemu_plugin.build import SOURCE, build_plugin
from vmibridge.cli.event_loop import check_loop, logging_to, run_on
from vmibridge.cli.logs import log_handler
from vmibridge.cli.output import stream_writer
from vmibridge.cli.run import Life, Prepared, serve
from vmibridge.cli.server_options import ServerOptions
from vmibridge.errors import BackendError, ConfigError
from vmibridge.qemu.find import GDB_NEEDS, PLUGIN_NEEDS, accelerators, find_qemu, memory_size
from vmibridge.qemu.process import QemuProcess
from vmibridge.server import BridgeServer
from vmibridge.vmi import Backend

_AFTERWARDS = 2.0
"""Seconds in which the end of QEMU is expected to end the run."""
_LISTENS = 10.0
"""Seconds in which QEMU is expected to listen."""


@dataclass(frozen=True)
class QemuOptions:
    """The options of the command."""

    arguments: tuple[str, ...]
    handlers: list[str]
    qemu: str | None
    via: Literal["plugin", "gdb"]
    accel: Literal["tcg", "kvm"] | None
    plugin: Path | None
    socket: Path | None
    absent: Literal["native", "wait"]
    share_memory: bool
    backend_options: str
    outcomes: Path | None


def run_qemu_guest(given: QemuOptions, options: ServerOptions) -> int:
    """Run QEMU to its end; returns the exit status. Raises `VmiBridgeError`."""
    if not given.handlers and given.socket is None:
        raise ConfigError("give --handlers that answer, or the --socket where a host listens")
    if given.via == "plugin" and "kvm" in (given.accel, *accelerators(given.arguments)):
        raise ConfigError(
            "with KVM the plugin is loaded and never trapped to: use TCG, or --via gdb"
        )
    if given.via == "gdb" and not given.handlers:
        raise ConfigError("--via gdb: the host connects to QEMU, so --handlers are needed here")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmibridge-")))
        socket = given.socket or folder / "vmi.sock"
        ram = stack.enter_context(_memory_file()) if given.share_memory else None
        qemu = QemuProcess([*_command(given, socket, ram), *given.arguments])
        if not given.handlers:
            check_loop(options.loop)
            with logging_to(log_handler(options.log_level, None), options.log_level):
                return run_on(options.loop, partial(_run_alone, qemu))
        outcomes = _outcomes_to(given.outcomes, stack)
        return _serve(given, options, _backend(given, socket, ram, folder), outcomes, qemu)


def _command(given: QemuOptions, socket: Path, ram: Path | None) -> list[str]:
    found = find_qemu(given.qemu, PLUGIN_NEEDS if given.via == "plugin" else GDB_NEEDS)
    command = [found.path]
    if not accelerators(given.arguments):
        command += ["-accel", given.accel or "tcg"]
    if ram is not None:
        size = memory_size(given.arguments)
        backend = f"memory-backend-file,id=vmibridge-ram,size={size},mem-path={ram},share=on"
        command += ["-object", backend, "-machine", "memory-backend=vmibridge-ram"]
    if given.via == "gdb":
        return [*command, "-S", "-gdb", f"unix:{_escaped(socket)},server=on,wait=off"]
    plugin = given.plugin or _built_plugin()
    told = f"file={_escaped(plugin)},socket={_escaped(socket)},absent={given.absent}"
    if ram is not None:
        told += f",ram={ram}"
    return [*command, "-plugin", told]


def _escaped(path: Path) -> str:
    """As a value among QEMU's options, where a comma is doubled."""
    return str(path.absolute()).replace(",", ",,")


def _built_plugin() -> Path:
    """The plugin of this source, which is built once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmibridge"
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = cache / f"plugin-{name}.so"
    return path if path.exists() else build_plugin(path)


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


async def _run_alone(qemu: QemuProcess) -> int:
    """QEMU without a host here. SIGINT and SIGTERM end it through its monitor."""
    status = 0
    async with anyio.create_task_group() as tasks:
        received = await tasks.start(_cancel_on_signal, tasks.cancel_scope)
        async with qemu:
            status = await qemu.wait()
        tasks.cancel_scope.cancel()
    return 128 + received[0] if received else _exit_status(status)


async def _cancel_on_signal(
    scope: anyio.CancelScope, *, task_status: TaskStatus[list[int]]
) -> None:
    received: list[int] = []
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started(received)
        async for number in signals:
            received.append(number)
            scope.cancel()


def _backend(given: QemuOptions, socket: Path, ram: Path | None, folder: Path) -> Backend:
    kind = "qemu-plugin" if given.via == "plugin" else "qemu-gdb"
    told = [given.backend_options] if given.backend_options else []
    if given.via == "gdb" and ram is not None:
        told.append(f"ram={quote(str(ram))}")
    if given.via == "gdb" and not {"-D", "-d", "-trace", "--trace"} & {*given.arguments}:
        # QEMU's log is nobody's else, so it may show what others do by QMP.
        told.append(f"stop-log={quote(str(folder / 'qemu.log'))}")
    return open_backend(f"{kind}:unix:{socket}" + ("?" + "&".join(told) if told else ""))


def _serve(
    given: QemuOptions, options: ServerOptions, backend: Backend, outcomes: int, qemu: QemuProcess
) -> int:
    prepared = Prepared.of(given.handlers, options)
    writer = stream_writer(outcomes, as_json=options.json)
    contexts: list[AbstractAsyncContextManager[object]] = [*prepared.taps, backend, writer]
    with logging_to(log_handler(options.log_level, None), options.log_level):
        server = prepared.server([backend])
        beside = partial(_run_qemu, qemu, server)
        if isinstance(backend, QemuGdbBackend):
            socket = Path(backend.where.removeprefix("unix:"))
            contexts = [qemu, _listening(qemu, socket), *contexts]
            beside = partial(_watch_gdb, qemu, server, backend)
        status = run_on(options.loop, partial(serve, Life(contexts, server, writer, beside)))
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


async def _watch(qemu: QemuProcess, server: BridgeServer) -> None:
    """QEMU's end is that of the run, also when no vCPU ever came."""
    await qemu.wait()
    await anyio.sleep(_AFTERWARDS)
    server.stop()


def _outcomes_to(path: Path | None, stack: ExitStack) -> int:
    if path is None:
        return sys.stderr.fileno()
    try:
        return stack.enter_context(path.open("wb")).fileno()
    except OSError as error:
        raise BackendError(f"{path}: cannot be written: {error.strerror}") from error


def _exit_status(status: int) -> int:
    """As a shell tells it: 128 and its number for a signal."""
    return 128 - status if status < 0 else status
