"""One replay of a recording, compared with what was recorded."""

from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from vmibridge.bridge.dispatch import Bridge
from vmibridge.cli.progress import ReadingBar
from vmibridge.cli.replay_result import ReplayPrinter
from vmibridge.cli.setting_options import with_options
from vmibridge.config import Config, HandlerFactory
from vmibridge.engine.server import BridgeServer
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import SESSION, Session
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.recording.replay.walk import Walk


class Replay:
    """The VMs of one file, replayed together. `sessions`: what the file says of them, by VM."""

    def __init__(
        self,
        file: Path,
        options: list[ReplayOptions],
        sessions: dict[str, Session],
        *,
        as_json: bool,
    ) -> None:
        self._file = file
        self._options = options
        self._sessions = sessions
        self._printer = ReplayPrinter(as_json=as_json)

    async def compare(self, sources: list[str], config: Path | None, timeout: float | None) -> int:
        """Ask the handlers of `sources`; returns the exit status. Raises `VmiBridgeError`.

        `timeout`: seconds for one request, in place of what was recorded.
        """
        factory = HandlerFactory(sources, Config() if config is None else Config.read(config))
        printer, walk = self._printer, Walk(self._file)
        backends = [
            ReplayBackend(self._file, options, options.vm or "vm", printer.difference, walk)
            for options in self._options
        ]
        bridges: dict[str, Bridge] = {each.vm: factory(each.vm) for each in backends}
        company: list[ReplayBackend] = []
        if any(handler.shared for bridge in bridges.values() for handler in bridge.handlers):
            # What a shared handler does for one VM depends on what it did for the others.
            for name in self._sessions:
                if name not in bridges:
                    options = msgspec.structs.replace(self._options[0], vm=name)
                    company.append(ReplayBackend(self._file, options, name, walk=walk))
                    bridges[name] = factory(name)
        async with AsyncExitStack() as stack:
            for backend in backends + company:
                await stack.enter_async_context(backend)
            settings = msgspec.structs.asdict(self._settings(timeout))
            server = BridgeServer(backends + company, bridges.__getitem__, **settings)
            with ReadingBar(backends[0].reader, f"replaying {self._file}") as bar:
                async for _ in server.run():
                    bar.step()
            for backend in backends:
                printer.changes(backend.session, bridges[backend.vm].handlers)
                printer.problems(backend.reader)
        strict = any(options.strict for options in self._options)
        return printer.end(self._file, backends, strict=strict)

    def _settings(self, timeout: float | None) -> ServerSettings:
        recorded = [self._sessions.get(options.vm or "") for options in self._options]
        session = next((session for session in recorded if session is not None), None)
        settings = replay_settings(ServerSettings() if session is None else session.settings)
        return with_options(settings, {"timeout": timeout})


def sessions_of(file: Path) -> list[Session]:
    """The VMs of a recording. Raises `RecordingReadError`."""
    with RecordingReader(file) as reader, ReadingBar(reader, f"reading {file}") as bar:
        found: dict[str, Session] = {}
        for _, message in reader.messages(SESSION):
            bar.step()
            assert isinstance(message, Session)
            found.setdefault(message.vm, message)
        return list(found.values())
