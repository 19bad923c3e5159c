"""`vmibridge run`: a guest, its handlers, and what is shown of them."""

import logging
import os
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import msgspec
from anyio import CancelScope
from anyio.abc import TaskStatus
from rich.console import Console

from vmibridge.backend import open_backend
from vmibridge.cli.event_loop import Loop, check_loop, logging_to, run_on
from vmibridge.cli.logs import log_handler
from vmibridge.cli.output import JsonWriter, LineWriter, TableWriter, Writer
from vmibridge.config import Config
from vmibridge.errors import (
    BackendError,
    BackendSpecError,
    ConfigError,
    VmiBridgeError,
)
from vmibridge.loading import HandlerFactory
from vmibridge.server import BridgeServer
from vmibridge.vmi import Backend, GuestEnd

if TYPE_CHECKING:
    from vmibridge.recording import Recorder

log = logging.getLogger(__name__)

_LAST_LINES = 1.0
"""Seconds, after a second signal, in which the last outcomes are shown."""
_MORE = {
    1: "handlers have their grace period, again to cancel them",
    2: "handlers are cancelled, again to end at once",
}


class RunOptions(msgspec.Struct, frozen=True):
    """The options of the command."""

    backends: list[str]
    handlers: list[str]
    loop: Loop
    timeout: float | None
    soft_timeout: float | None
    config: Path | None
    record: Path | None
    redact: list[str]
    unrecorded: Literal["stop", "continue"] | None
    json: bool
    log_level: str


def run_guest(options: RunOptions) -> int:
    """Run a guest until it ends; returns the exit status. Raises `VmiBridgeError`."""
    config = Config() if options.config is None else Config.read(options.config)
    settings = config.server
    for name in ("timeout", "soft_timeout"):
        seconds = getattr(options, name)
        if seconds is not None:
            try:
                settings = msgspec.structs.replace(settings, **{name: seconds})
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error
    check_loop(options.loop)
    taps = _taps(options)
    backends = _open_backends(options.backends)
    console = None if options.json or not sys.stdout.isatty() else Console()
    writer: Writer
    if options.json:
        writer = JsonWriter()
    elif console is None:
        writer = LineWriter()
    else:
        writer = TableWriter(console)
    with logging_to(log_handler(options.log_level, console), options.log_level):
        factory = HandlerFactory(options.handlers, config)
        try:
            server = BridgeServer(backends, factory, **msgspec.structs.asdict(settings), taps=taps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return run_on(options.loop, partial(_serve, taps, backends, server, writer))


def _open_backends(specs: list[str]) -> list[Backend]:
    """`NAME=SPEC` names the VM; without, it is `vm`, or `vm0` and on when there are several."""
    backends = []
    for number, text in enumerate(specs):
        name, named, spec = text.partition("=")
        if named and ":" not in name:
            if not name:
                raise BackendSpecError(f"{text}: the name of the VM is missing before '='")
            backends.append(open_backend(spec, vm=name))
        else:
            backends.append(open_backend(text, vm=f"vm{number}" if len(specs) > 1 else "vm"))
    return backends


def _taps(options: RunOptions) -> "list[Recorder]":
    if options.record is None:
        for name in ("redact", "unrecorded"):
            if getattr(options, name):
                raise ConfigError(f"--{name} is about a recording: give --record FILE, too")
        return []
    from vmibridge.recording import Recorder

    return [Recorder(options.record, on_error=options.unrecorded or "stop", redact=options.redact)]


async def _serve(
    taps: "list[Recorder]", backends: list[Backend], server: BridgeServer, writer: Writer
) -> int:
    received: list[int] = []
    failure: VmiBridgeError | None = None
    async with anyio.create_task_group() as tasks:
        run = anyio.CancelScope()
        await tasks.start(_stop_on_signal, server, run, received)
        try:
            with run:
                async with AsyncExitStack() as stack:
                    for tap in taps:
                        await stack.enter_async_context(tap)
                    for backend in backends:
                        await stack.enter_async_context(backend)
                    await stack.enter_async_context(writer)
                    async for outcome in server.run():
                        await writer.show(outcome)
                    await writer.end(server.summaries)
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
    ends = {vm: summary.guest for vm, summary in server.summaries.items()}
    failed = [
        f"vm {vm}: {_diagnosis(guest)}" if len(ends) > 1 else _diagnosis(guest)
        for vm, guest in ends.items()
        if guest is None or guest.failed
    ]
    if failed:
        raise BackendError("; ".join(failed))
    return 0


async def _stop_on_signal(
    server: BridgeServer,
    run: CancelScope,
    received: list[int],
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal stops in good order, a second leaves no grace, a third exits."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            received.append(number)
            if len(received) > 2:
                # A handler may shield itself from being cancelled; the user has the last word.
                os._exit(128 + number)
            log.info("%s: stopping; %s", signal.Signals(number).name, _MORE[len(received)])
            server.stop(now=len(received) > 1)
            if len(received) > 1:
                # Whoever reads standard output may not read on.
                run.deadline = anyio.current_time() + _LAST_LINES


def _diagnosis(guest: GuestEnd | None) -> str:
    if guest is None:
        return "the guest did not run"
    failed = [end for end in guest.vcpus if end.reason in ("crashed", "lost")]
    return "; ".join(f"vcpu {end.vcpu} {end.reason}: {end.detail}" for end in failed)
