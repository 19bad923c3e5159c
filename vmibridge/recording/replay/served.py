"""One recording, served by handlers on the running loop: what the command and `Replay` share.

async with serve_recording(path, names, bridge_for, verdict, ReplayOptions()) as served:
    async for _ in served.server.run():
        ...
served.result()
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from sniffio import current_async_library

from vmibridge.bridge.dispatch import Bridge
from vmibridge.engine.server import BridgeServer
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import SESSION, TRAP, Session
from vmibridge.recording.other_vms import other_vms_in
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.changes import handler_changes
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.file_result import FileResult
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.recording.replay.request_result import RequestResult
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.replay.walk import Walk
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import TrapEvent

__all__ = [
    "ServedRecording",
    "check_renamed",
    "needs_start",
    "serve_recording",
    "sessions_of",
    "vms_asked",
]


_MAX_NAMED = 10


def needs_start(selection: Selection) -> bool:
    """Whether it tells times since the first trap of the recording."""
    moments = (selection.since, selection.until)
    return any(moment is not None and moment.relative for moment in moments)


def sessions_of(
    reader: RecordingReader, *, with_start: bool, step: Callable[[], object] = bool
) -> tuple[dict[str, Session], int]:
    """The VMs of a recording, and when its first trap was taken; 0: there is none, or it is not
    asked for. Calls `step` after each session. Blocking."""
    found: dict[str, Session] = {}
    for _, message in reader.messages(SESSION):
        step()
        assert isinstance(message, Session)
        found.setdefault(message.vm, message)
    start = 0
    if with_start:
        start = next((each.time for each in reader.messages(TRAP)), 0)
    return found, start


def check_renamed(
    sessions: Mapping[str, Session], renamed: Mapping[str, str], option: str = "--rename"
) -> None:
    """Raise `ConfigError` for a VM to rename that is not in a file, as far as it tells, and for two
    that would have one name."""
    names: dict[str, str] = {}
    for old in renamed if sessions else ():
        if old not in sessions:
            there = ", ".join(f"{name!a}" for name in [*sessions][:_MAX_NAMED])
            raise ConfigError(f"{option}: there is no VM {old!a}; there are {there}")
    for old in sessions:
        new = renamed.get(old, old)
        other = names.setdefault(new, old)
        if other != old:
            raise ConfigError(f"{option}: both {other!a} and {old!a} would be called {new!a}")


def vms_asked(
    sessions: Mapping[str, Session],
    chosen: frozenset[str],
    *,
    all_of_them: bool,
    may_lack: bool = False,
) -> list[str | None]:
    """The VMs of a file that are asked, where these are chosen; none: all are.

    `all_of_them`: those that are not compared, too, as where a handler serves all of them: it had
    their requests. `may_lack`: the file need not have those that are chosen; else the backend says
    which there are.
    """
    if not chosen:
        return [*sessions] or [None]
    there = [name for name in sessions if name in chosen]
    if not there:
        return [] if may_lack else [*sorted(chosen)]
    missing = [] if may_lack else sorted(chosen - sessions.keys())
    return [*(sessions if all_of_them else there), *missing]


class ServedRecording:
    """A recording that is open, and the server that asks handlers; run it once."""

    def __init__(
        self,
        path: Path,
        backends: Sequence[ReplayBackend],
        bridges: Mapping[str, Bridge],
        server: BridgeServer,
        verdict: Verdict,
    ) -> None:
        self.backends: Sequence[ReplayBackend] = backends
        """One for each VM that is asked."""
        self.bridges: Mapping[str, Bridge] = bridges
        """By the names of VMs."""
        self.server: BridgeServer = server
        self._path = path
        self._verdict = verdict

    @property
    def reader(self) -> RecordingReader:
        """What reads the file."""
        return self.backends[0].reader

    @property
    def place(self) -> int:
        """How many messages of the file have been played; any thread may ask."""
        return self.backends[0].walk.place()

    @property
    def waits_for(self) -> TrapEvent | None:
        """A trap that is not answered yet; any thread may ask."""
        awaited = self.backends[0].walk.awaited
        if awaited is not None:
            return awaited.event
        return next((trap for each in self.backends for trap in each.unanswered()), None)

    def notes(self, *, has_config: bool) -> Iterator[str]:
        """Which handlers are not the ones that were recorded, and what could not be read; that the
        event loop is another one, where something is different. Call it on that.

        `has_config`: handlers have settings of a file."""
        for backend in self.backends:
            yield from _other_loop(backend)
            handlers = self.bridges[backend.vm].handlers
            yield from handler_changes(backend.session, handlers, has_config=has_config)
            is_shared = any(handler.shared for handler in handlers)
            yield from (
                f"vm {backend.vm}: the recording says: {gap}"
                for gap in backend.conductor.gaps
                if is_shared or other_vms_in(gap) is None
            )
        yield from self.reader.problem_lines()

    def result(self) -> FileResult:
        """What came of it so far."""
        verdict = self._verdict
        return FileResult(
            self._path,
            {backend.vm: backend.result for backend in self.backends},
            started=min(backend.started for backend in self.backends),
            problems=self.reader.problem_count,
            findings=verdict.findings.all(),
            findings_left_out=verdict.findings.left_out,
            kinds=verdict.compared,
        )


def _other_loop(backend: ReplayBackend) -> Iterator[str]:
    if backend.session is None or not backend.result.different:
        return
    # That of uvloop goes on in the same steps.
    then, now = backend.session.loop, current_async_library()
    if then and (then == "trio") != (now == "trio"):
        family = "trio" if then == "trio" else "asyncio"
        yield (
            f"vm {backend.vm}: it was recorded on {then}, and handlers may go on in other steps on"
            f" {now}: replay it on {family} to see what is different there, too"
        )


@asynccontextmanager
async def serve_recording(
    path: Path,
    names: Iterable[str | None],
    bridge_for: Callable[[str], Bridge],
    verdict: Verdict,
    options: ReplayOptions,
    *,
    renamed: Mapping[str, str],
    change: Callable[[ServerSettings], ServerSettings],
    taps: Sequence[Tap] = (),
    on_difference: Callable[[Difference], None] | None = None,
    on_request: Callable[[RequestResult], None] | None = None,
    file: Path | None = None,
) -> AsyncIterator[ServedRecording]:
    """Open the VMs of these names, and make their handlers.

    `renamed`: from a VM's recorded name to that of now. `change` gets the settings that were
    recorded and returns those of the server. Raises as the backend does, what `bridge_for` and
    `change` raise, and `ConfigError` for what `BridgeServer` does not take. `file`: what is read in
    the place of `path`, which is standard input.
    """
    file = path if file is None else file
    walk = Walk(file, options.speed)
    backends = [
        ReplayBackend(
            file,
            msgspec.structs.replace(options, vm=name),
            renamed.get(name or "", name or "vm"),
            on_difference,
            walk=walk,
            verdict=verdict,
            on_request=on_request,
        )
        for name in names
    ]
    bridges: dict[str, Bridge] = {}

    failed: list[ValueError] = []

    def make(vm: str) -> Bridge:
        try:
            bridge = bridges[vm] = bridge_for(vm)
        except ValueError as error:  # of a handler
            failed.append(error)
            raise
        return bridge

    async with AsyncExitStack() as stack:
        for backend in backends:
            await stack.enter_async_context(backend)
        settings = change(_recorded_settings(backends))
        try:
            server = BridgeServer(backends, make, taps=taps, **msgspec.structs.asdict(settings))
        except ValueError as error:
            if failed:
                raise
            raise ConfigError(f"{path}: {error}") from error
        yield ServedRecording(path, backends, bridges, server, verdict)


def _recorded_settings(backends: Iterable[ReplayBackend]) -> ServerSettings:
    sessions = (backend.session for backend in backends)
    session = next((session for session in sessions if session is not None), None)
    return replay_settings(ServerSettings() if session is None else session.settings)
