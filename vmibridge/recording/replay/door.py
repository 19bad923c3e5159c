"""A replay for tests: played up to where a test wants to look, and then on.

    async with Replay("run.mcap", Verdict()) as replay:
        await replay.until(17)
        ...                              # time stands still; look at the handler
        await replay.run()
        assert replay.difference is None

It replays as `vmibridge replay` does, on virtual time: on an event loop of its own, in a thread
(`own_loop`), whatever the loop of the test is.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, Unpack

import anyio
import anyio.lowlevel
import msgspec
from sniffio import current_async_library

from vmibridge.bridge.dispatch import Bridge, Target
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError, NotReplayedError, ServerStateError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.replay.accept import write_accepted
from vmibridge.recording.replay.asked import Asked, check_asked, make_bridge, may_share
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.file_result import FileResult, result_lines
from vmibridge.recording.replay.keywords import Keywords, Order, check_settings
from vmibridge.recording.replay.options import ReplayResult, SettingChanges
from vmibridge.recording.replay.own_loop import LoopName, OwnLoop
from vmibridge.recording.replay.request_result import RequestResult
from vmibridge.recording.replay.served import (
    ServedRecording,
    check_renamed,
    needs_start,
    serve_recording,
    sessions_of,
    vms_asked,
)
from vmibridge.recording.replay.sought import Played, Sought, What
from vmibridge.recording.unmatched import Unmatched
from vmibridge.text import printable

__all__ = ["Replay"]

_MAX_DIFFERENCES = 1000
"""That are kept."""

H = TypeVar("H", bound=BridgeHandler[Any])
Names: TypeAlias = str | Iterable[str]
Numbers: TypeAlias = int | Iterable[int]
Codes: TypeAlias = int | str | Iterable[int | str]


class Replay:
    """A recording, whose requests handlers are asked again.

    `handlers` are instances; classes, of which each VM gets an instance of its own, or all get one
    if they say `shared`, made without arguments, or with their `Settings` where all of these have
    defaults; and functions that make something for the VM that they are given the name of.
    Instances serve several VMs only if they say `shared`. They run in another thread and on another
    loop than the test: what they take of the test must not be bound to its loop, such as a
    connection that is open.

    What is compared, as of `vmibridge replay`; what is given for different keywords is an and:

    - `requests`, `methods`: codes, or names of handlers and methods; `outcomes`: how they ended
    - `vms`: names, as recorded; `vcpus`: numbers
    - `first`, `last`: numbers of traps, of each VM; nothing behind `last` is asked
    - `since`, `until`: seconds since the first trap, or ISO 8601

    `ignore`: rules of what does not count, as `output.id`. `strict`: the order of memory accesses
    counts, too. `no_outside`: `vmi.outside` calls nothing that is not recorded. `speed`: 1: as fast
    as it was; 0: without waiting. `order`: what a trap waits for, as `ReplayOptions` says.
    `rename`: from the recorded name of a VM to that of now. `accept`: what differs is accepted, see
    `accept()`; then it does not count as a difference. `loop`: asyncio or trio; by default the one
    that the test runs on. Further keywords are fields of `ServerSettings`, in place of the recorded
    ones.

    Enter it once: that opens the file and makes the handlers. Leaving it ends the replay, wherever
    it is, and waits for the end; handlers are cancelled then, and left. Where the block raises
    nothing, leaving raises `NotReplayedError` when nothing was compared.

    Raises `ConfigError` for values that are none, settings that are out of bounds, and for a class
    or a function that cannot be called so; `TypeError` for another keyword. Entering raises
    `ConfigError` for a function that makes no handler, an instance that would serve two VMs, and a
    VM to rename that is not in the recording; `RecordingReadError` for a file that is no recording,
    `BackendSpecError` for a VM that is not in it, and what making a handler raises.
    """

    def __init__(
        self,
        path: str | Path,
        /,
        *handlers: Asked,
        requests: Codes = (),
        methods: Codes = (),
        outcomes: Names = (),
        vms: Names = (),
        vcpus: Numbers = (),
        first: int | None = None,
        last: int | None = None,
        since: float | str | None = None,
        until: float | str | None = None,
        ignore: Names = (),
        strict: bool = False,
        no_outside: bool = False,
        speed: float = 0.0,
        order: Order = "recorded",
        rename: Mapping[str, str] | None = None,
        accept: bool = False,
        loop: LoopName | None = None,
        **settings: Unpack[SettingChanges],
    ) -> None:
        unknown = settings.keys() - SettingChanges.__annotations__.keys()
        if unknown:
            raise TypeError(f"Replay() has no keyword {min(unknown)!r}")
        if not handlers:
            raise ConfigError("a replay has at least one handler to ask")
        check_asked(handlers)
        asked = Keywords.checked(
            requests=requests,
            methods=methods,
            outcomes=outcomes,
            vms=vms,
            vcpus=vcpus,
            first=first,
            last=last,
            since=since,
            until=until,
            ignore=ignore,
            strict=strict,
            no_outside=no_outside,
            speed=speed,
            order=order,
            rename=rename,
            accept=accept,
            loop=loop,
        )
        check_settings(settings)
        self.path: Path = Path(path)
        self._handlers = handlers
        self._selection = asked.selection()
        self._verdict = asked.verdict(self._selection)
        self._options = asked.options()
        self._renamed = dict(rename or {})
        self._recorded = {new: old for old, new in self._renamed.items()}
        self._settings = settings
        self._shared: dict[type[BridgeHandler[Any]], Target] = {}
        self._loop = loop
        self._served: ServedRecording | None = None
        self._differences: list[Difference] = []
        self._notes: list[str] = []
        self._played = Played()
        self.compared: Played = Played()
        """With `accept`, the requests that were compared, by their recorded VMs and numbers."""
        self.changed: Played = Played()
        """With `accept`, those of them whose answers of now are accepted."""
        self._nothing = "no request could be compared"
        self._has_failed = False
        self._own: OwnLoop | None = None

    # --- what is known --------------------------------------------------------------

    @property
    def difference(self) -> Difference | None:
        """The first one so far; `None`: there is none."""
        return self._differences[0] if self._differences else None

    @property
    def differences(self) -> tuple[Difference, ...]:
        """All so far, in the order of the replay; at most the first 1,000."""
        return tuple(self._differences)

    @property
    def result(self) -> ReplayResult:
        """The counts so far, of all VMs. What was accepted is not different."""
        file = self._file_result()
        different = 0 if self._verdict.accepted is not None else file.different
        return ReplayResult(file.compared, different, self.difference, file.ignored, file.unchecked)

    @property
    def accepted(self) -> int:
        """Requests that differ and are accepted."""
        return 0 if self._verdict.accepted is None else self._verdict.accepted.count

    def handler(self, kind: type[H], vm: str | None = None) -> H:
        """The handler of this class, of the VM of this name; by default of the first that has one.

        Raises `LookupError` where there is none, `ServerStateError` before it is entered.
        """
        for name, bridge in self._is_served().bridges.items():
            for handler in bridge.handlers:
                if isinstance(handler, kind) and vm in (None, name):
                    return handler
        raise LookupError(f"there is no handler {kind.__name__}{'' if vm is None else f' of {vm}'}")

    def report(self) -> str:
        """What `vmibridge replay` prints: the first difference, findings in groups, counts; then
        which handlers are not the recorded ones, and what could not be read of the file."""
        lines = chain(result_lines(self._file_result()), self._notes)
        return "\n".join(map(printable, lines))

    # --- playing it -----------------------------------------------------------------

    async def __aenter__(self) -> Self:
        own = self._begin(current_async_library())
        await own.wait(own.start)
        self._raise_error()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own = self._own
        if own is not None and not own.is_over:
            with anyio.CancelScope(shield=True):
                await own.wait(own.end)
        self._left(error)

    async def run(self) -> ReplayResult:
        """Play to the end; returns the counts.

        Raises `NotReplayedError` when nothing was compared, `ServerStateError` when it is over
        because it was cancelled, and what a handler raised that could not be entered or left. If
        cancelled, ends the replay.
        """
        await self._play(_never)
        return self.result

    async def until(
        self,
        what: What | None = None,
        /,
        *,
        vm: str | None = None,
        vcpu: int | None = None,
        handler: str | type[BridgeHandler[Any]] | None = None,
        request: int | None = None,
        method: int | str | None = None,
    ) -> RequestResult:
        """Play to the first request for which all of this is true, and stand still behind its
        answer. Nothing of the replay goes on then, nor does its time, until it is played on.

        `what`: the number of a trap of it, or a function; each VM has numbers of its own, so where
        there are several a number needs `vm`, too. `handler`: its class or its name. `method`: its
        code or its name. Requests are done in the order of their answers.

        Raises `NotReplayedError` when the recording ends before; `ValueError` for a trap that has
        been played already, and for one of several VMs: then nothing is played; `TypeError` and
        `ValueError` for what is no number, name or class; what the function raises, and as `run`
        does. If cancelled, ends the replay.
        """
        sought = Sought.of(what, vm, vcpu, handler, request, method)
        if isinstance(what, int):
            sought = sought.of_one(self._vms())
            if self._played.has(what, sought.vm):
                raise ValueError(f"{self.path}: trap {what} has been played already")
        found = await self._play(sought.is_in)
        if found is None:
            raise NotReplayedError(
                f"{self.path}: ends before the request that is waited for: {sought}"
            )
        return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestResult:
        """The next request, in the order of their answers; it stands still behind it.

        Raises as `run` does."""
        found = await self._play(_always)
        if found is None:
            raise StopAsyncIteration
        return found

    def accept(self, target: str | Path | None = None) -> int:
        """Write a recording with the answers of now for all that was accepted; returns how many.

        It takes the place of the one that is replayed, or is a new file, `target`; where nothing
        was accepted, none is written. Blocking. Raises `ServerStateError` before the end of the
        replay, or without `accept`; `ConfigError` when `target` is there already, and
        `RecordingError` when it cannot be written: then there is what was there before.
        """
        accepted = self._verdict.accepted
        if accepted is None or self._own is None or not self._own.is_at_end:
            raise ServerStateError("give `accept=True`, and play it to its end before")
        if accepted.count:
            replace = target is None
            write_accepted(self.path, Path(target or self.path), accepted, replace=replace)
        return accepted.count

    # --- the same without an event loop -----------------------------------------------

    def begin(self, loop: LoopName = "asyncio") -> None:
        """As entering it, for a caller without an event loop. Blocking."""
        own = self._begin(loop)
        own.block(own.start)
        self._raise_error()

    def play(self) -> ReplayResult:
        """As `run`, for a caller without an event loop. Blocking."""
        own = self._is_begun()
        if not own.is_at_end:
            own.block(partial(own.go, _never))
        self._arrived(own)
        return self.result

    def end(self) -> None:
        """End it wherever it is, for a caller without an event loop. Blocking; raises nothing."""
        own = self._own
        if own is not None and not own.is_over:
            own.block(own.end)

    # --- inside ---------------------------------------------------------------------

    def _begin(self, loop: str) -> OwnLoop:
        if self._own is not None:
            raise ServerStateError("a replay is entered once: make another for another run")
        chosen: LoopName = self._loop or ("trio" if loop == "trio" else "asyncio")
        self._own = OwnLoop(self._serve, self._verdict.end, chosen, self._options.speed)
        return self._own

    async def _play(self, is_there: Callable[[RequestResult], bool]) -> RequestResult | None:
        own = self._is_begun()
        if not own.is_at_end:
            await own.wait(partial(own.go, is_there))
        return self._arrived(own)

    def _arrived(self, own: OwnLoop) -> RequestResult | None:
        """Where it stands still; `None`: at its end. Raises what there is to raise."""
        if own.raised is not None:
            raise own.raised
        if not own.is_over:
            return own.at
        self._raise_error()
        if not self._file_result().compared:
            self._has_failed = True
            raise NotReplayedError(f"{self.path}: {self._nothing}")
        return None

    def _raise_error(self) -> None:
        own = self._own
        if own is not None and own.error is not None and not self._has_failed:
            self._has_failed = True
            raise own.error

    def _left(self, error: BaseException | None) -> None:
        if error is not None or self._has_failed:
            return
        self._raise_error()
        if not self._file_result().compared:
            raise NotReplayedError(f"{self.path}: no request was compared: play it")

    def _is_begun(self) -> OwnLoop:
        if self._own is None:
            raise ServerStateError("a replay is played in its `async with`")
        return self._own

    def _vms(self) -> list[str]:
        """The names of the VMs that are compared."""
        served, chosen = [*self._is_served().bridges], self._selection.vms
        return [vm for vm in served if self._recorded.get(vm, vm) in chosen] or served

    def _is_served(self) -> ServedRecording:
        if self._served is None:
            raise ServerStateError("a replay has handlers and results when it is entered")
        return self._served

    def _file_result(self) -> FileResult:
        return FileResult(self.path) if self._served is None else self._served.result()

    # --- on its own loop ------------------------------------------------------------

    async def _serve(self) -> None:
        own, verdict = self._is_begun(), self._verdict
        with RecordingReader(self.path) as reader:
            sessions, start = sessions_of(reader, with_start=needs_start(self._selection))
        verdict.begin_file(start)
        check_renamed(sessions, self._renamed, "rename")
        names = vms_asked(sessions, self._selection.vms, all_of_them=may_share(self._handlers))
        async with serve_recording(
            self.path,
            names,
            self._bridge_for,
            verdict,
            self._options,
            renamed=self._renamed,
            change=self._changed,
            on_request=self._hear,
        ) as served:
            self._served = served
            own.stand(None)
            await anyio.lowlevel.checkpoint_if_cancelled()
            async for _ in served.server.run():
                pass
            self._notes = list(served.notes(has_config=True))
            if self._verdict.selects and not served.result().compared:
                unmatched = Unmatched(self._selection)
                unmatched.look_at(served.reader.messages())
                self._nothing = self._nothing if unmatched.has_some else str(unmatched)

    def _hear(self, request: RequestResult) -> None:
        self._played.add(request)
        difference = request.difference
        if self._verdict.accepted is not None and request.unchecked is None:
            vm = self._recorded.get(request.vm, request.vm)
            self.compared.add_trap(vm, request.seq)
            if difference is not None:
                self.changed.add_trap(vm, request.seq)
                request = msgspec.structs.replace(request, difference=None)
        elif difference is not None and len(self._differences) < _MAX_DIFFERENCES:
            self._differences.append(difference)
        self._is_begun().hear(request)

    def _bridge_for(self, vm: str) -> Bridge:
        return make_bridge(self._handlers, vm, self._shared)

    def _changed(self, recorded: ServerSettings) -> ServerSettings:
        # To stand still is not to hold up the loop.
        return msgspec.structs.replace(
            recorded, **{"blocked_after": float("inf"), **self._settings}
        )


def _never(_: RequestResult) -> bool:
    return False


def _always(_: RequestResult) -> bool:
    return True
