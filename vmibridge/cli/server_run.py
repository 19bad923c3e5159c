"""A server of a command, from its options to its end: what `run` and `qemu run` share."""

import logging
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio
import msgspec

from vmibridge.cli.event_loop import check_loop
from vmibridge.cli.guest_exits import GuestExits
from vmibridge.cli.output import Writer
from vmibridge.cli.reloading import Reloader, has_terminal
from vmibridge.cli.server_options import ServerOptions
from vmibridge.cli.setting_options import with_options
from vmibridge.cli.signals import exit_status, hangup_is_ignored, stop_on_signals
from vmibridge.cli.stop_bound import STOP_MARGIN, StopBound
from vmibridge.config import Config, HandlerFactory
from vmibridge.engine.server import BridgeServer
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.until import Until
from vmibridge.errors import (
    BackendError,
    ConfigError,
    RecordingError,
    VmiBridgeError,
)
from vmibridge.health.state import Health
from vmibridge.text import counted
from vmibridge.vm.backend import Backend, GuestEnd, VcpuEnd
from vmibridge.vm.main_status import status_of_main

if TYPE_CHECKING:
    from vmibridge.recording import Recorder
    from vmibridge.recording.answers import RecordedAnswers

log: logging.Logger = logging.getLogger(__name__)

LAST_LINES = 1.0
"""Seconds, after a second signal, in which the last outcomes are shown."""
_MORE = {
    1: "handlers have their grace period, again to cancel them",
    2: "handlers are cancelled, again to end at once",
}


@dataclass(frozen=True)
class Prepared:
    """What options ask for, checked, before any VM is there."""

    handlers: list[str]
    config: Config
    settings: ServerSettings
    taps: "list[Recorder]"
    options: ServerOptions

    @classmethod
    def of(cls, handlers: list[str], options: ServerOptions) -> Self:
        """Raises `ConfigError`, `MissingExtraError`."""
        config = Config() if options.config is None else Config.read(options.config)
        settings = with_options(config.server, options.settings)
        check_loop(options.loop)
        taps = [options.recorder()] if options.records() else []
        return cls(handlers, config, settings, taps, options)

    def server(
        self, backends: list[Backend], answers: "RecordedAnswers | None" = None
    ) -> BridgeServer:
        """Raises `HandlerLoadError` and `ConfigError`. `answers` stand in for the handlers."""
        settings = msgspec.structs.asdict(self.settings)
        if answers is not None:
            # Who was asked then, answers now: the recording.
            settings["handshake"] = False
            for name in self.config.handler_names:
                where = f"{self.config.source}: [handlers.{name}]"
                log.warning("%s is not used: the recording answers", where)
        factory = answers or HandlerFactory(self.handlers, self.config)
        try:
            return BridgeServer(backends, factory, **settings, taps=self.taps)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def health(self, server: BridgeServer) -> Health:
        """That of a process that runs `server`."""
        health = Health(stop_within=self.settings.grace + self.settings.stop_timeout + STOP_MARGIN)
        health.add(server.health)
        return health

    def stop_bound(self, more: float = 0.0, then: Callable[[], None] | None = None) -> StopBound:
        """The time of a stop of the server, and `more` seconds: then recordings are saved, and
        `then` is called."""

        def save() -> None:
            for tap in self.taps:
                tap.finish_now()
            if then is not None:
                then()

        seconds = self.settings.grace + self.settings.stop_timeout + more
        return StopBound(seconds, save, exit_zero=self.options.exit_zero)

    def reloader(self, server: BridgeServer, health: Health) -> Reloader:
        """What loads the handlers of `server` again."""
        return Reloader(self.handlers, self.options, server.reload, health)


@dataclass(frozen=True)
class Life:
    """A server and what it needs, in the order in which that is entered."""

    contexts: list[AbstractAsyncContextManager[object]]
    server: BridgeServer
    writer: Writer
    beside: Callable[[], Coroutine[None, None, None]] | None = None
    """Runs beside the server, cancelled at its end; where it fails, the server stops."""
    until: Until | None = None
    """When the run ends, other than with its guest."""
    reloader: Reloader | None = None
    """What loads handlers again."""
    answers: "RecordedAnswers | None" = None
    """What answers in the place of handlers."""
    exits: GuestExits = field(default_factory=GuestExits)
    """Of its guests, by now."""
    recorders: "list[Recorder]" = field(default_factory=list)
    """Those among `contexts`."""
    bound: StopBound | None = None
    """What ends the process when a stop takes too long."""
    exit_zero: bool = False
    """Whether a stop by a signal is a success."""
    health: Health = field(default_factory=Health)
    """What others are told of it."""


async def run_server(life: Life) -> int:
    """Run a server to its end, or that of the user's patience; returns the exit status.

    A VM whose guest has exited is stopped; the others run on.
    """
    server, exits = life.server, life.exits
    received: list[int] = []
    failures: list[VmiBridgeError | KeyboardInterrupt] = []
    run = anyio.CancelScope()
    is_up = False

    def stop(number: signal.Signals, now: bool) -> None:
        log.info("%s: stopping; %s", number.name, _MORE[min(len(received), 2)])
        life.health.stop_begins()
        server.stop(now=now)
        if not is_up:
            # A backend may wait for its VM for as long as it is told to.
            run.cancel()
        elif now:
            # The reader of standard output may have stopped reading.
            run.deadline = anyio.current_time() + LAST_LINES

    at_terminal = has_terminal()

    def hang_up() -> None:
        if at_terminal and not has_terminal():
            if not received:
                received.append(signal.SIGHUP)
                log.info("SIGHUP: the terminal was closed: stopping")
                life.health.stop_begins()
                server.stop()
        elif life.reloader is not None:
            life.reloader.note_hangup()

    also = {} if hangup_is_ignored() else {signal.SIGHUP: hang_up}
    stopping = partial(stop_on_signals, bound=life.bound)
    held = nullcontext() if life.bound is None else life.bound.held()
    async with anyio.create_task_group() as tasks:
        await tasks.start(stopping, stop, received, also)
        try:
            with run, held:
                async with AsyncExitStack() as stack:
                    for context in life.contexts:
                        await stack.enter_async_context(context)
                    is_up = True
                    if life.beside is not None:
                        tasks.start_soon(_run_beside, life.beside, server, failures)
                    outcomes = server.run(life.until)
                    if life.reloader is not None:
                        tasks.start_soon(life.reloader.run)
                    async for outcome in outcomes:
                        if (exited := exits.take(outcome)) is not None:
                            server.stop(vm=exited)
                        await life.writer.show(outcome)
                    await _finish(life.recorders, server)
                    await life.writer.end(server.summaries, exits.of)
        except BrokenPipeError:
            failures.append(BackendError("standard output was closed: no outcome can be shown"))
        except (VmiBridgeError, KeyboardInterrupt) as error:
            # No Ctrl-C comes as an exception here: a handler has raised it.
            failures.append(error)
        tasks.cancel_scope.cancel()
    return _status(life, received, failures)


async def _finish(recorders: "list[Recorder]", server: BridgeServer) -> None:
    """Write what is left before the summary is shown, which says what of it had no room."""
    for recorder in recorders:
        await recorder.finish()
        for vm, summary in server.summaries.items():
            summary.unrecorded += recorder.lost_since(vm)


def _status(
    life: Life, received: list[int], failures: list[VmiBridgeError | KeyboardInterrupt]
) -> int:
    """The exit status of a run that has ended. Raises what it failed by."""
    if life.answers is not None:
        for line in life.answers.lines():
            log.info("%s", line)
    if failures:
        raise failures[0]
    if (stopped := exit_status(received, zero=life.exit_zero)) is not None:
        return stopped
    ends = {vm: summary.guest for vm, summary in life.server.summaries.items()}
    failed = [
        f"vm {vm}: {_diagnosis(guest)}" if len(ends) > 1 else _diagnosis(guest)
        for vm, guest in ends.items()
        if vm not in life.exits.of and (guest is None or guest.failed)
    ]
    if failed:
        raise BackendError("; ".join(failed))
    if life.answers is not None and life.answers.fails and life.answers.missing:
        told = counted(life.answers.missing, "request was", "requests were")
        raise RecordingError(f"{told} not in the recording; --missing refuse lets that pass")
    return life.exits.status(ends)


async def _run_beside(
    beside: Callable[[], Coroutine[None, None, None]],
    server: BridgeServer,
    failures: list[VmiBridgeError | KeyboardInterrupt],
) -> None:
    try:
        await beside()
    except VmiBridgeError as error:
        failures.append(error)
        server.stop(now=True)


def _diagnosis(guest: GuestEnd | None) -> str:
    if guest is None:
        return "the guest did not run"
    failed = [end for end in guest.vcpus if end.reason in ("crashed", "lost")]
    return "; ".join(map(_told, failed))


def _told(end: VcpuEnd) -> str:
    status = status_of_main(end)
    if status is not None:
        return f"vcpu {end.vcpu}: main returned {status}"
    return f"vcpu {end.vcpu} {end.reason}: {end.detail}"
