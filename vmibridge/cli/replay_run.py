"""A replay of recordings, one after another, compared with what was recorded."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path

import msgspec

from vmibridge.aio.clock import VirtualTime
from vmibridge.bridge.dispatch import Bridge
from vmibridge.cli.event_loop import run_on
from vmibridge.cli.options import Loop
from vmibridge.cli.progress import ReadingBar
from vmibridge.cli.replay_break import Break, Breaks
from vmibridge.cli.replay_junit import junit_report
from vmibridge.cli.replay_result import FileResult, ReplayPrinter
from vmibridge.cli.setting_options import with_options
from vmibridge.config import Config, HandlerFactory, reload_handlers
from vmibridge.engine.server import BridgeServer
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import (
    BackendSpecError,
    ConfigError,
    NotReplayedError,
    RecordingReadError,
    VmiBridgeError,
)
from vmibridge.recording.export import new_files
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.source import readable_again
from vmibridge.recording.messages import SESSION, TRAP, Session
from vmibridge.recording.replay.accept import Accepted, write_accepted
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.ignore import IgnoreRule
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.replay.walk import Walk
from vmibridge.recording.selection import Selection

_ALL = Selection()
_LONG = 86_400.0
"""Seconds for one request, while somebody may look at it."""


class Replay:
    """Recordings that are replayed, each with new handlers."""

    def __init__(
        self,
        paths: list[Path],
        options: ReplayOptions,
        selection: Selection,
        *,
        loop: Loop,
        renamed: dict[str, str],
        limit: int | None,
        fail_fast: bool,
        target: Path | None,
        breaks: Sequence[Break] = (),
        with_pdb: bool = False,
        as_json: bool,
    ) -> None:
        """`target`: where the recording goes that `--accept` makes; `breaks`: where it stops."""
        self._paths = paths
        self._options = options
        self._selection = selection
        self._loop: Loop = loop
        self._renamed = renamed
        self._limit = limit
        self._fail_fast = fail_fast
        self._target = target
        self._breaks = list(breaks)
        self._with_pdb = with_pdb
        self._printer = ReplayPrinter(as_json=as_json, several=len(paths) > 1)
        self._has_begun = False
        self._files: dict[Path, Path] = {}
        """What is read for each path."""

    def run(
        self,
        sources: list[str],
        config_file: Path | None,
        ignore: Iterable[str],
        timeout: float | None,
        *,
        least: float | None,
        junit: Path | None,
    ) -> int:
        """Ask the handlers of `sources`; returns the exit status. Raises `VmiBridgeError`.

        `timeout`: seconds for one request, in place of what was recorded; `least`: of the requests
        that are to be compared, in percent; `junit`: where a report of the result goes.
        """
        config = Config() if config_file is None else Config.read(config_file)
        rules = [IgnoreRule.parse(text, "--ignore ") for text in ignore]
        where = f"{config.source}: replay.ignore: "
        rules += [IgnoreRule.parse(text, where) for text in config.replay_ignore]
        verdict = Verdict(
            self._selection,
            rules,
            limit=self._limit,
            fail_fast=self._fail_fast,
            count_kinds=junit is not None,
        )
        if self._target is not None:
            if self._target.exists():
                raise ConfigError(f"{self._target}: already exists, and is not written over")
            verdict.accepted = Accepted(all_handlers=self._selection == _ALL)
        results = []
        with ExitStack() as stack:
            for path in self._paths:
                if verdict.is_over:
                    break
                self._files[path] = stack.enter_context(readable_again(path))
                results.append(self._run_file(path, sources, config, timeout, verdict))
            self._write_accepted(results, verdict)
        if junit is not None:
            with new_files([junit], replace=True) as (part,):
                part.write_bytes(junit_report(results))
        return self._printer.end(
            results,
            strict=self._options.strict,
            least=least,
            selects=self._selection != _ALL or verdict.is_over,
            accepts=verdict.accepted is not None,
        )

    def _write_accepted(self, results: Sequence[FileResult], verdict: Verdict) -> None:
        if verdict.accepted is not None and any(each.compared for each in results):
            source, target = self._files[self._paths[0]], self._target or Path()
            write_accepted(source, target, verdict.accepted)
            self._printer.accepted(verdict.accepted.count, target)

    def _run_file(
        self,
        path: Path,
        sources: list[str],
        config: Config,
        timeout: float | None,
        verdict: Verdict,
    ) -> FileResult:
        try:
            sessions, start = _sessions_of(self._files[path], with_start=self._needs_start)
            verdict.begin_file(start)
            one = partial(self._compare, path, sessions, sources, config, timeout, verdict)
            return run_on(self._loop, one, VirtualTime(self._options.speed))
        except (RecordingReadError, BackendSpecError) as error:
            if len(self._paths) == 1:
                raise
            why = str(error)
        except VmiBridgeError as error:
            if len(self._paths) == 1:
                raise NotReplayedError(str(error)) from error
            if isinstance(error, ConfigError) or not self._has_begun:
                raise
            why = f"{path}: {error}"
        self._printer.failed(why)
        return FileResult(path, error=why)

    @property
    def _needs_start(self) -> bool:
        moments = (self._selection.since, self._selection.until)
        return any(moment is not None and moment.relative for moment in moments)

    async def _compare(
        self,
        path: Path,
        sessions: dict[str, Session],
        sources: list[str],
        config: Config,
        timeout: float | None,
        verdict: Verdict,
    ) -> FileResult:
        # A module may keep something of the file before.
        make = reload_handlers if self._has_begun else HandlerFactory
        factory = make(sources, config)
        self._has_begun = True
        bridges: dict[str, Bridge] = {}

        def bridge_for(vm: str) -> Bridge:
            bridge = bridges[vm] = factory(vm)
            return bridge

        printer, file = self._printer, self._files[path]
        walk = Walk(file)
        backends = []
        for name in self._names(sessions, all_of_them=factory.has_shared):
            vm = self._renamed.get(name or "", name or "vm")
            options = msgspec.structs.replace(self._options, vm=name)
            backends.append(
                ReplayBackend(
                    file,
                    options,
                    vm,
                    partial(printer.difference, path),
                    walk=walk,
                    verdict=verdict,
                )
            )
        if not backends:
            return FileResult(path)
        async with AsyncExitStack() as stack:
            for backend in backends:
                await stack.enter_async_context(backend)
            settings = msgspec.structs.asdict(_settings(backends, timeout))
            breaks = self._breaks_of(path, backends, verdict)
            if self._breaks:
                # Time goes by while somebody looks.
                settings |= {"timeout": _LONG if timeout is None else timeout}
                settings |= {"blocked_after": math.inf}
            server = BridgeServer(
                backends, bridge_for, taps=[breaks] if self._breaks else [], **settings
            )
            for vm, bridge in bridges.items():
                breaks.hear_handlers(vm, bridge.handlers)
            with ReadingBar(backends[0].reader, f"replaying {path}") as bar:
                async for _ in server.run():
                    bar.step()
            if breaks.error is not None:
                raise breaks.error
            for backend in backends:
                printer.changes(
                    backend.session, bridges[backend.vm].handlers, has_config=bool(config.source)
                )
                printer.problems(backend.reader)
        result = FileResult(
            path,
            {backend.vm: backend.result for backend in backends},
            started=min(backend.started for backend in backends),
            problems=max(backend.reader.problem_count for backend in backends),
            findings=verdict.findings.all(),
            findings_left_out=verdict.findings.left_out,
            kinds=verdict.compared,
        )
        printer.file(result)
        return result

    def _breaks_of(self, path: Path, backends: Sequence[ReplayBackend], verdict: Verdict) -> Breaks:
        names = {backend.vm: backend.options.vm or backend.vm for backend in backends}
        return Breaks(path, self._breaks, names, verdict.end, with_pdb=self._with_pdb)

    def _names(self, sessions: dict[str, Session], *, all_of_them: bool) -> list[str | None]:
        """The VMs of a file that are asked. Those that are not compared are where a handler
        serves all of them: it had their requests, too."""
        chosen = self._selection.vms
        if not chosen:
            return [*sessions] or [None]
        there = [name for name in sessions if name in chosen]
        if not there:
            # The backend says which there are.
            return [] if len(self._paths) > 1 else [*sorted(chosen)]
        missing = [] if len(self._paths) > 1 else sorted(chosen - sessions.keys())
        return [*(sessions if all_of_them else there), *missing]


def recordings_in(paths: Iterable[Path]) -> list[Path]:
    """The recordings that are named, and those in folders that are named, in order.

    Raises `ConfigError` for a folder without one.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = None
            continue
        inside = sorted(path.rglob("*.mcap"))
        if not inside:
            raise ConfigError(f"{path}: there is no recording in it (*.mcap)")
        found.update(dict.fromkeys(inside))
    return list(found)


def _settings(backends: list[ReplayBackend], timeout: float | None) -> ServerSettings:
    sessions = (backend.session for backend in backends)
    session = next((session for session in sessions if session is not None), None)
    settings = replay_settings(ServerSettings() if session is None else session.settings)
    return with_options(settings, {"timeout": timeout})


def _sessions_of(path: Path, *, with_start: bool) -> tuple[dict[str, Session], int]:
    """The VMs of a recording, and when its first trap was taken; 0: there is none, or it is not
    asked for. Raises `RecordingReadError`."""
    with RecordingReader(path) as reader, ReadingBar(reader, f"reading {path}") as bar:
        found: dict[str, Session] = {}
        for _, message in reader.messages(SESSION):
            bar.step()
            assert isinstance(message, Session)
            found.setdefault(message.vm, message)
        start = 0
        if with_start:
            start = next((each.time for each in reader.messages(TRAP)), 0)
        return found, start
