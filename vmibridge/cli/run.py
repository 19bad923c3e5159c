"""`vmibridge run`: a guest, its handlers, and what is shown of them."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import anyio
import msgspec
from anyio import CancelScope
from anyio.abc import TaskStatus
from rich.console import Console

from vmibridge.backend import open_backend
from vmibridge.cli.logs import log_handler
from vmibridge.cli.output import JsonWriter, LineWriter, TableWriter, Writer
from vmibridge.config import Config
from vmibridge.dispatch import Bridge
from vmibridge.errors import BackendError, ConfigError, MissingExtraError, VmiBridgeError
from vmibridge.loading import load_handlers
from vmibridge.server import BridgeServer
from vmibridge.vmi import Backend, GuestEnd


class RunOptions(msgspec.Struct, frozen=True):
    """The options of the command."""

    backend: str
    handlers: list[str]
    loop: Literal["asyncio", "uvloop", "trio"]
    timeout: float | None
    config: Path | None
    json: bool
    log_level: str


def run_guest(options: RunOptions) -> int:
    """Run a guest until it ends; returns the exit status. Raises `VmiBridgeError`."""
    config = Config() if options.config is None else Config.read(options.config)
    settings = config.server
    if options.timeout is not None:
        try:
            settings = msgspec.structs.replace(settings, timeout=options.timeout)
        except ValueError as error:
            raise ConfigError(f"--timeout: {error}") from error
    _check_loop(options.loop)
    backend = open_backend(options.backend)
    console = None if options.json or not sys.stdout.isatty() else Console()
    writer: Writer
    if options.json:
        writer = JsonWriter()
    elif console is None:
        writer = LineWriter()
    else:
        writer = TableWriter(console)
    with _logging(log_handler(options.log_level, console), options.log_level):
        bridge = Bridge(*load_handlers(options.handlers, config))
        server = BridgeServer(backend, bridge, **msgspec.structs.asdict(settings))
        return anyio.run(
            _serve,
            backend,
            server,
            writer,
            backend="trio" if options.loop == "trio" else "asyncio",
            backend_options={"use_uvloop": True} if options.loop == "uvloop" else {},
        )


def _check_loop(loop: str) -> None:
    if loop == "asyncio":
        return
    try:
        __import__(loop)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the event loop {loop}", loop) from error


@contextmanager
def _logging(handler: logging.Handler, level: str) -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


async def _serve(backend: Backend, server: BridgeServer, writer: Writer) -> int:
    received: list[int] = []
    failure: VmiBridgeError | None = None
    async with anyio.create_task_group() as tasks:
        run = anyio.CancelScope()
        await tasks.start(_stop_on_signal, server, run, received)
        try:
            with run:
                async with backend, writer:
                    async for outcome in server.run():
                        await writer.show(outcome)
                    await writer.end(server.summary)
        except BrokenPipeError:
            failure = BackendError("standard output was closed: nobody reads the outcomes")
        except VmiBridgeError as error:
            failure = error
        except SystemExit as error:
            failure = BackendError(f"a handler asked to exit, with {error.code!r}")
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if received:
        return 128 + received[0]
    guest = server.summary.guest
    if guest is None or guest.failed:
        raise BackendError(_diagnosis(guest))
    return 0


async def _stop_on_signal(
    server: BridgeServer,
    run: CancelScope,
    received: list[int],
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal stops in good order, a second cuts that short, a third exits."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            received.append(number)
            if len(received) > 2:
                # A handler may shield itself from being cancelled; the user has the last word.
                os._exit(128 + number)
            if len(received) > 1:
                run.cancel()
            server.stop()


def _diagnosis(guest: GuestEnd | None) -> str:
    if guest is None:
        return "the guest did not run"
    failed = [end for end in guest.vcpus if end.reason in ("crashed", "lost")]
    return "; ".join(f"vcpu {end.vcpu} {end.reason}: {end.detail}" for end in failed)
