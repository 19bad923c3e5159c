"""`vmibridge replay`: the requests of a recording, asked again and compared."""

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from vmibridge.cli.event_loop import Loop, check_loop, logging_to, run_on
from vmibridge.cli.logs import log_handler
from vmibridge.cli.progress import ReadingBar
from vmibridge.cli.replay_result import ReplayPrinter
from vmibridge.config import Config
from vmibridge.dispatch import Bridge
from vmibridge.errors import (
    BackendSpecError,
    NotReplayedError,
    RecordingReadError,
    VmiBridgeError,
)
from vmibridge.loading import HandlerFactory
from vmibridge.recording.messages import SESSION, Session
from vmibridge.recording.reader import RecordingReader
from vmibridge.recording.replay import ReplayBackend, ReplayOptions, replay_settings
from vmibridge.server import BridgeServer
from vmibridge.settings import ServerSettings


class ReplayCommand(msgspec.Struct, frozen=True):
    """The options of the command."""

    file: Path
    handlers: list[str]
    vms: list[str]
    speed: float
    order: Literal["recorded", "vcpu"]
    strict: bool
    loop: Loop
    timeout: float | None
    config: Path | None
    json: bool
    log_level: str


def replay(command: ReplayCommand) -> int:
    """Replay and compare; returns the exit status.

    Raises `RecordingReadError`, `BackendSpecError` and `NotReplayedError`.
    """
    check_loop(command.loop)
    sessions = _sessions(command.file)
    names: list[str | None] = [*command.vms] or [session.vm for session in sessions] or [None]
    known = {session.vm: session for session in sessions}
    with logging_to(log_handler(command.log_level, None), command.log_level):
        try:
            return run_on(command.loop, partial(_replay, command, names, known))
        except (RecordingReadError, BackendSpecError):
            raise
        except VmiBridgeError as error:
            raise NotReplayedError(str(error)) from error


async def _replay(
    command: ReplayCommand, names: list[str | None], sessions: dict[str, Session]
) -> int:
    config = Config() if command.config is None else Config.read(command.config)
    factory = HandlerFactory(command.handlers, config)
    bridges: dict[str, Bridge] = {}

    def bridge_for(vm: str) -> Bridge:
        bridge = bridges[vm] = factory(vm)
        return bridge

    printer = ReplayPrinter(as_json=command.json)
    backends = [
        ReplayBackend(
            command.file,
            ReplayOptions(command.speed, command.order, name, command.strict),
            name or "vm",
            printer.difference,
        )
        for name in names
    ]
    session = next((sessions[name] for name in names if name in sessions), None)
    settings = replay_settings(ServerSettings() if session is None else session.settings)
    if command.timeout is not None:
        try:
            settings = msgspec.structs.replace(settings, timeout=command.timeout)
        except ValueError as error:
            raise NotReplayedError(f"--timeout: {error}") from error
    async with AsyncExitStack() as stack:
        for backend in backends:
            await stack.enter_async_context(backend)
        server = BridgeServer(backends, bridge_for, **msgspec.structs.asdict(settings))
        with ReadingBar(backends[0].reader, f"replaying {command.file}") as bar:
            async for _ in server.run():
                bar.step()
        for backend in backends:
            printer.changes(backend.session, bridges[backend.vm].handlers)
            printer.problems(backend.reader)
    same = printer.end(command.file, backends, strict=command.strict)
    return 0 if same else 1


def _sessions(file: Path) -> list[Session]:
    """The VMs of a recording. Raises `RecordingReadError`."""
    with RecordingReader(file) as reader, ReadingBar(reader, f"reading {file}") as bar:
        found: dict[str, Session] = {}
        for _, message in reader.messages(SESSION):
            bar.step()
            assert isinstance(message, Session)
            found.setdefault(message.vm, message)
        return list(found.values())
