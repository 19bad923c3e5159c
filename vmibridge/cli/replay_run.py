"""A replay of recordings, one after another, compared with what was recorded."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path

import msgspec

from vmibridge.aio.clock import VirtualTime
from vmibridge.cli.event_loop import run_on
from vmibridge.cli.options import Loop
from vmibridge.cli.pipes import STDOUT, output_file
from vmibridge.cli.progress import ReadingBar, with_progress
from vmibridge.cli.replay_break import Break, Breaks
from vmibridge.cli.replay_junit import junit_report
from vmibridge.cli.replay_result import ReplayPrinter
from vmibridge.cli.replay_standstill import STILL, StandstillNote
from vmibridge.cli.setting_options import with_options
from vmibridge.config import Config, HandlerFactory, reload_handlers
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
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
from vmibridge.recording.messages import Session
from vmibridge.recording.replay.accept import Accepted, write_accepted
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.file_result import FileResult
from vmibridge.recording.replay.ignore import IgnoreRule
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.served import (
    ServedRecording,
    check_renamed,
    needs_start,
    serve_recording,
    sessions_of,
    vms_asked,
)
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.selection import Selection
from vmibridge.recording.unmatched import Unmatched

_ALL = Selection()
_LONG = 86_400.0
"""Seconds for one request, while somebody may look at it."""


class ReplayRun:
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
        # Standard output may be the recording.
        out = sys.stderr if target == STDOUT else sys.stdout
        self._printer = ReplayPrinter(as_json=as_json, several=len(paths) > 1, out=out)
        self._has_begun = False
        self._has_config = False
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
        self._has_config = config_file is not None
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
        for made in (self._target, junit):
            # Before a replay that may take minutes.
            if made is not None and not made.parent.is_dir():
                raise ConfigError(f"{made}: there is no folder {made.parent}")
        if self._target is not None:
            if self._target != STDOUT and self._target.exists():
                raise ConfigError(f"{self._target}: already exists, and is not written over")
            verdict.accepted = Accepted(all_handlers=self._selection == _ALL)
        results = []
        with ExitStack() as stack:
            for path in self._paths:
                if verdict.is_over:
                    break
                self._files[path] = stack.enter_context(readable_again(path))
                results.append(self._run_file(path, sources, config, timeout, verdict))
            self._write_accepted(
                results, verdict, partial(self._check, sources, config, rules, timeout)
            )
            unmatched = self._unmatched(results)
        self._printer.notes(
            f"--break {each.text[:80]!r}: no handler was asked there"
            for each in self._breaks
            if not each.is_met and not verdict.is_over
        )
        if junit is not None:
            with new_files([junit], replace=True) as (part,):
                part.write_bytes(junit_report(results, accepts=verdict.accepted is not None))
        return self._printer.end(
            results,
            unmatched=unmatched,
            strict=self._options.strict,
            least=least,
            selects=self._selection != _ALL or verdict.is_over,
            accepts=verdict.accepted is not None,
        )

    def _write_accepted(
        self,
        results: Sequence[FileResult],
        verdict: Verdict,
        check: Callable[[Path, Path], None],
    ) -> None:
        accepted = verdict.accepted
        if accepted is None or not any(each.compared for each in results):
            return
        source, target = self._files[self._paths[0]], self._target or Path()
        waits = accepted.count > 0 and accepted.journal.has_waits
        with output_file(target) as path:
            write_accepted(source, path, accepted)
            if waits and target == STDOUT:
                check(path, target)
        self._printer.accepted(accepted.count, target, renamed=bool(self._renamed))
        if waits and target != STDOUT:
            check(target, target)

    def _check(
        self,
        sources: list[str],
        config: Config,
        rules: Sequence[IgnoreRule],
        timeout: float | None,
        path: Path,
        target: Path,
    ) -> None:
        """Replay the new recording, `target`, which is read as `path`, and tell what differs."""
        verdict = Verdict(self._selection, rules, limit=self._limit)
        try:
            sessions, start = _sessions_of(path, with_start=needs_start(self._selection))
            verdict.begin_file(start)
            factory = reload_handlers(sources, config)
            names = self._names(sessions, all_of_them=factory.has_shared)
            serve = partial(self._serve, path, names, factory, timeout, verdict)
            one = partial(_differing, serve, f"checking {path}")
            found = run_on(self._loop, one, VirtualTime(self._options.speed))
        except VmiBridgeError as error:
            self._printer.failed(f"{target}: whether it replays the same is not known: {error}")
            return
        self._printer.unstable(target, found)

    def _run_file(
        self,
        path: Path,
        sources: list[str],
        config: Config,
        timeout: float | None,
        verdict: Verdict,
    ) -> FileResult:
        try:
            sessions, start = _sessions_of(
                self._files[path], with_start=needs_start(self._selection)
            )
            if len(self._paths) == 1:
                check_renamed(sessions, self._renamed)
            verdict.begin_file(start)
            # Before there is a loop, so that Ctrl-C ends a module that takes long. For each file
            # again: a module may keep something of the one before.
            make = reload_handlers if self._has_begun else HandlerFactory
            factory = make(sources, config)
            self._has_begun = True
            one = partial(self._compare, path, sessions, factory, timeout, verdict)
            return run_on(self._loop, one, VirtualTime(self._options.speed))
        except (RecordingReadError, BackendSpecError) as error:
            if len(self._paths) == 1:
                unmatched = None if isinstance(error, RecordingReadError) else self._unmatched()
                if unmatched is None:
                    raise
                raise NotReplayedError(f"{path}: {unmatched}") from error
            why = str(error)
        except VmiBridgeError as error:
            if len(self._paths) == 1:
                raise NotReplayedError(str(error)) from error
            if isinstance(error, ConfigError) or not self._has_begun:
                raise
            why = f"{path}: {error}"
        self._printer.failed(why)
        return FileResult(path, error=why)

    def _unmatched(self, results: Sequence[FileResult] = ()) -> str | None:
        """That the selection takes no trap of any recording, where it does not."""
        if self._selection == _ALL or any(
            each.compared or each.unchecked or each.error is not None for each in results
        ):
            return None
        unmatched = Unmatched(self._selection)
        for path, file in self._files.items():
            with RecordingReader(file) as reader:
                unmatched.look_at(with_progress(reader.messages(), reader, f"reading {path}"))
        return None if unmatched.has_some else str(unmatched)

    async def _compare(
        self,
        path: Path,
        sessions: dict[str, Session],
        factory: HandlerFactory,
        timeout: float | None,
        verdict: Verdict,
    ) -> FileResult:
        printer, names = self._printer, self._names(sessions, all_of_them=factory.has_shared)
        if not names:
            return FileResult(path)
        recorded = {self._renamed.get(name, name): name for name in names if name is not None}
        breaks = Breaks(path, self._breaks, recorded, verdict.end, with_pdb=self._with_pdb)
        tell = partial(printer.difference, path)
        taps = [breaks] if self._breaks else []
        async with self._serve(
            path, names, factory, timeout, verdict, tell, taps, self._files[path]
        ) as served:
            for vm, bridge in served.bridges.items():
                breaks.hear_handlers(vm, bridge.handlers)
            # Where somebody looks, or it waits as it did then, it is to stand still.
            is_asked = bool(self._breaks or self._options.speed)
            still = StandstillNote(
                path, served, lambda line: printer.notes([line]), None if is_asked else STILL
            )
            with ReadingBar(served.reader, f"replaying {path}") as bar, still:
                async for _ in served.server.run():
                    bar.step()
            if breaks.error is not None:
                raise breaks.error
            printer.notes(served.notes(has_config=self._has_config))
            result = served.result()
        printer.file(result)
        return result

    def _serve(
        self,
        path: Path,
        names: Sequence[str | None],
        factory: HandlerFactory,
        timeout: float | None,
        verdict: Verdict,
        on_difference: Callable[[Difference], None],
        taps: Sequence[Tap] = (),
        file: Path | None = None,
    ) -> AbstractAsyncContextManager[ServedRecording]:
        return serve_recording(
            path,
            names,
            factory,
            verdict,
            self._options,
            renamed=self._renamed,
            change=partial(self._settings, timeout),
            taps=taps,
            on_difference=on_difference,
            file=file,
        )

    def _settings(self, timeout: float | None, recorded: ServerSettings) -> ServerSettings:
        settings = with_options(recorded, {"timeout": timeout})
        if not self._breaks:
            return settings
        # Time goes by while somebody looks.
        long = _LONG if timeout is None else timeout
        return msgspec.structs.replace(settings, timeout=long, blocked_after=math.inf)

    def _names(self, sessions: dict[str, Session], *, all_of_them: bool) -> list[str | None]:
        vms, several = self._selection.vms, len(self._paths) > 1
        return vms_asked(sessions, vms, all_of_them=all_of_them, may_lack=several)


async def _differing(
    serve: Callable[[Callable[[Difference], None]], AbstractAsyncContextManager[ServedRecording]],
    label: str,
) -> list[Difference]:
    found: list[Difference] = []
    async with serve(found.append) as served:
        with ReadingBar(served.reader, label) as bar:
            async for _ in served.server.run():
                bar.step()
    return found


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
            raise ConfigError(f"{path}: there is not a recording in it (*.mcap)")
        found.update(dict.fromkeys(inside))
    return list(found)


def _sessions_of(path: Path, *, with_start: bool) -> tuple[dict[str, Session], int]:
    """Raises `RecordingReadError`."""
    with RecordingReader(path) as reader, ReadingBar(reader, f"reading {path}") as bar:
        return sessions_of(reader, with_start=with_start, step=bar.step)
