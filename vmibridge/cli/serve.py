"""`vmibridge serve`: handlers for VMs whose agents are elsewhere."""

import logging
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakSet

import anyio
import msgspec
from cyclopts import Parameter

from vmibridge.bridge.outcome import Outcome
from vmibridge.cli.event_loop import logging_to, prints_beside, run_telling
from vmibridge.cli.guest_exits import GuestExits
from vmibridge.cli.logs import log_handler
from vmibridge.cli.options import Outcomes, Sources
from vmibridge.cli.quiet_output import stdout_writer
from vmibridge.cli.reloading import Reloader
from vmibridge.cli.server_options import ServerOptions
from vmibridge.cli.server_run import LAST_LINES, Prepared
from vmibridge.cli.setting_options import setting, with_options
from vmibridge.cli.signals import exit_status, stop_on_signals
from vmibridge.cli.stop_bound import STOP_MARGIN, StopBound
from vmibridge.cli.streams import encoded, json_line
from vmibridge.cli.trap_line import summary_json, summary_text
from vmibridge.config import HandlerFactory
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Hindrance, Tap
from vmibridge.errors import BackendError, RecordingError, VmiBridgeError
from vmibridge.health.state import Health
from vmibridge.text import counted, printable
from vmibridge.transport import AgentLimits, AgentServer
from vmibridge.transport.session import Repeated

if TYPE_CHECKING:  # it needs an extra
    from vmibridge.recording import Recorder

log: logging.Logger = logging.getLogger(__name__)


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
    handlers: Sources,
    keep_vm: Annotated[float | None, setting(AgentLimits, "keep")] = None,
    repeated: Annotated[
        Repeated,
        Parameter(
            help="A trap that a server which is gone may have run: give the guest its fallback,"
            " or run it."
        ),
    ] = "refuse",
    outcomes: Outcomes = True,
    options: ServerOptions | None = None,
) -> int:
    """Answer the traps of VMs whose agents connect; each VM has handlers of its own.

    --record names a folder here: each VM has a file of its own in it.

    SIGHUP, and with --reload a change of their files, reloads the handlers without dropping a trap;
    until then each VM gets those that were loaded. SIGINT and SIGTERM stop as with run; traps
    that come then are given back to their agents, for the server that follows.

    Exit status: 1 when it cannot listen or a handler module fails, 2 for wrong usage.

    Example: vmibridge serve --listen unix:/run/vmibridge.sock --handlers vmibridge.handlers.hello
    """
    # Handlers may be reloaded, and a change within a second would go unseen.
    sys.dont_write_bytecode = True
    given = options or ServerOptions()
    # A recorder is made for each VM; those of `run` and `qemu` are not wanted.
    prepared = Prepared.of(handlers, given.without_recording())
    recordings = _Recordings(given) if given.records("FOLDER") else None
    limits = with_options(AgentLimits(), {"keep": keep_vm}, {"keep": "keep_vm"})
    with (
        prints_beside(json=given.json),
        logging_to(log_handler(given.log_level, None), given.log_level),
    ):
        factory = HandlerFactory(handlers, prepared.config)
        # Once, to find what is wrong with them before anybody comes.
        factory.make()
        settings = prepared.settings
        command = _Command(
            handlers,
            given,
            StopBound(
                settings.grace + settings.stop_timeout,
                (lambda: None) if recordings is None else recordings.finish_now,
                exit_zero=given.exit_zero,
            ),
            Health(stop_within=settings.grace + settings.stop_timeout + STOP_MARGIN),
            recordings,
            outcomes=outcomes,
        )
        command.server = AgentServer(
            listen,
            factory,
            settings=settings,
            limits=limits,
            repeated=repeated,
            on_outcome=command.show,
            on_end=command.show_end,
            taps=recordings,
        )
        return run_telling(given.loop, command.run, command.health, given.health_socket)


class _Recordings:
    """A file for each set of handlers of each VM, in a folder."""

    def __init__(self, options: ServerOptions) -> None:
        """Raises what is wrong with them before anybody comes."""
        from vmibridge.recording.folder_probe import FolderProbe

        assert options.record is not None
        self._options = options
        self._recorders: WeakSet[Recorder] = WeakSet()
        self._probe = FolderProbe(options.record, holds_guests=options.unrecorded != "continue")
        options.recorder()

    @property
    def hindrance(self) -> Hindrance | None:
        """Why the next VM could not be recorded."""
        return self._probe.hindrance

    async def watch(self) -> None:
        """Keep `hindrance` as it is on the disk."""
        await self._probe.watch()

    def __call__(self, vm: str) -> Sequence[Tap]:
        self._probe.make_folder()
        recorder = self._options.recorder(stem=re.sub(r"[^\w.-]", "_", vm).lstrip("."))
        self._recorders.add(recorder)
        return [recorder]

    def lost_since(self, vm: str) -> int:
        """How many traps of a VM that has ended are missing beyond its `Summary.unrecorded`."""
        return sum(recorder.lost_since(vm) for recorder in list(self._recorders))

    def finish_now(self) -> None:
        """Finish those that are open: see `Recorder.finish_now`."""
        for recorder in list(self._recorders):
            recorder.finish_now()


class _Command:
    """One run of the command."""

    server: AgentServer

    def __init__(
        self,
        sources: list[str],
        options: ServerOptions,
        bound: StopBound,
        health: Health,
        recordings: "_Recordings | None",
        *,
        outcomes: bool,
    ) -> None:
        self.health = health
        self._bound = bound
        self._sources = sources
        self._recordings = recordings
        self._options = options
        self._writer = stdout_writer(as_json=options.json, outcomes=outcomes)
        self._received: list[int] = []
        self._unwritten = 0
        """Traps that the stop had no room for."""
        self._failure: VmiBridgeError | None = None
        self._scope: anyio.CancelScope | None = None
        self._writing = anyio.Lock()
        self._exits = GuestExits()

    async def run(self) -> int:
        """Serve until a signal."""
        async with anyio.create_task_group() as tasks:
            self.health.add(self.server.health)
            reloader = Reloader(self._sources, self._options, self.server.reload, self.health)
            also = {signal.SIGHUP: reloader.note_hangup}
            stopping = partial(stop_on_signals, bound=self._bound)
            await tasks.start(stopping, self._stop, self._received, also)
            tasks.start_soon(reloader.run)
            if self._recordings is not None:
                tasks.start_soon(self._recordings.watch)
            try:
                with self._bound.held(), anyio.CancelScope() as self._scope:
                    async with self._writer:
                        await self.server.run()
            except BrokenPipeError:
                self._lose_reader()
            except VmiBridgeError as error:
                self._failure = error
            tasks.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        if self._unwritten:
            traps = counted(self._unwritten, "trap was", "traps were")
            raise RecordingError(f"{self._options.record}: {traps} not recorded at the stop")
        return exit_status(self._received, zero=self._options.exit_zero) or 0

    async def show(self, outcome: Outcome[Any]) -> None:
        """A trap was answered. A guest that has exited ends its session, and no other."""
        if (exited := self._exits.take(outcome)) is not None:
            self.server.end(exited, "its guest has exited")
        try:
            async with self._writing:
                await self._writer.show(outcome)
        except BrokenPipeError:
            self._lose_reader()

    async def show_end(self, vm: str, summary: Summary, counts: dict[str, int]) -> None:
        """A VM has ended, and its recording is closed."""
        exits = self._exits.leave(vm)
        if self._recordings is not None and (lost := self._recordings.lost_since(vm)):
            summary.unrecorded += lost
            if self._received and self._options.unrecorded != "continue":
                self._unwritten += lost
        if self._options.json:
            line = msgspec.json.decode(summary_json({vm: summary}, exits))
            line["summary"] |= {"vm": vm, "agent": counts}
            data = json_line(msgspec.json.encode(line))
        else:
            data = encoded(f"vm {printable(vm)}: {summary_text(summary, exits)}\n")
        try:
            async with self._writing:
                await self._writer.write(data)
        except BrokenPipeError:
            self._lose_reader()

    def _lose_reader(self) -> None:
        if self._failure is None:
            self._failure = BackendError("standard output was closed: no outcome can be shown")
            self.server.stop()

    def _stop(self, number: signal.Signals, now: bool) -> None:
        log.info("%s: stopping", number.name)
        self.health.stop_begins()
        self.server.stop(now=now)
        if now and self._scope is not None:
            # The reader of standard output may have stopped reading.
            self._scope.deadline = anyio.current_time() + LAST_LINES
