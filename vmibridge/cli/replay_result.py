"""What a replay found, for people and as JSON.

| | standard output | standard error |
|---|---|---|
| for people | the first difference, and the counts | changed handlers, damage of the file |
| `--json` | an object for each difference, then the counts | the same |
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.cli.streams import json_line
from vmibridge.errors import NotReplayedError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Session
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.compare import Difference, describe
from vmibridge.recording.replay.options import MISSING
from vmibridge.recording.session import recorded_handler
from vmibridge.text import printable

_MAX_PROBLEMS = 10


class ReplayPrinter:
    """Tells what a replay finds."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._logged: set[str] = set()
        self._problems = 0

    def difference(self, difference: Difference) -> None:
        """One request was answered in another way."""
        if self._as_json:
            _print_json({"difference": difference})

    def changes(self, session: Session | None, handlers: Iterable[BridgeHandler[Any]]) -> None:
        """Which handlers are not the ones that were recorded."""
        if session is None:
            self._warn("the recording does not tell what served it then")
            return
        if session.part > 1:
            self._warn(
                f"this is part {session.part} of a recording: handlers lack the state of those"
                " before"
            )
        now = {handler.name: recorded_handler(handler) for handler in handlers}
        for then in session.handlers:
            known = now.get(then.name)
            if known is None:
                # The server adds the handshake by itself.
                if then.name != "host":
                    self._warn(f"handler {then.name}: served then, is not there now")
            elif known.sha256 != then.sha256:
                self._warn(f"handler {then.name}: its source has changed since ({then.source})")

    def problems(self, reader: RecordingReader) -> None:
        """What could not be read of the file."""
        self._problems = max(self._problems, reader.problem_count)
        for problem in reader.problems[:_MAX_PROBLEMS]:
            self._warn(f"{reader.path}: {problem}")

    def end(self, file: Path, backends: Sequence[ReplayBackend], *, strict: bool) -> int:
        """Tell the counts; returns the exit status.

        Raises `NotReplayedError`, after the counts, when there was nothing to compare: a check
        that looks at the status alone must not take that for success.
        """
        results = {backend.vm: backend.result for backend in backends}
        compared = sum(result.compared for result in results.values())
        different = sum(result.different for result in results.values())
        unchecked: dict[str, int] = {}
        for result in results.values():
            for why, count in result.unchecked.items():
                unchecked[why] = unchecked.get(why, 0) + count
        missing = self._problems + sum(unchecked.get(why, 0) for why in MISSING)
        same = compared > 0 and not different and not (strict and missing)
        if self._as_json:
            counts = {
                "compared": compared,
                "different": different,
                "unchecked": unchecked,
                "problems": self._problems,
                "same": same,
            }
            _print_json({"replay": counts})
            return _status(file, compared, same=same)
        firsts = [result.first for result in results.values() if result.first is not None]
        start = min((backend.started for backend in backends), default=0)
        if firsts:
            _print(*difference_lines(min(firsts, key=lambda each: each.time), start), "")
        _print(f"{file}: {compared} requests compared, {different} different")
        _print(*(f"not compared: {count} ({why})" for why, count in unchecked.items()))
        if strict and missing:
            _print("strict: parts of the recording are missing")
        return _status(file, compared, same=same)

    def _warn(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            sys.stderr.write(f"vmibridge: {printable(text)}\n")


def _status(file: Path, compared: int, *, same: bool) -> int:
    if not compared:
        raise NotReplayedError(f"{file}: no request could be compared")
    return 0 if same else 1


def difference_lines(difference: Difference, start: int) -> list[str]:
    """One difference with its context; `start` is when the recording began, in nanoseconds."""
    after = (difference.time - start) / 1e9
    trap = f"trap {difference.seq} of vm {difference.vm}, vcpu {difference.vcpu}"
    lines = [f"first difference: {trap}, {after:.6f} s into the recording"]
    packet = difference.packet
    if packet is not None:
        codes = f"request {packet.request:#06x} method {packet.method:#06x}"
        values = " ".join(f"{value:#x}" for value in packet.values)
        lines += [f"  asked     magic {packet.magic:#010x} {codes}", f"  values    {values}"]
    for field in difference.fields:
        lines += [
            f"  {field.field:<9} expected  {field.expected}",
            f"            got       {field.got}",
        ]
    lines += _access_lines(difference.accesses)
    return lines


def _access_lines(accesses: Sequence[MemoryAccess]) -> list[str]:
    if not accesses:
        return ["  it accessed no memory before"]
    return ["  memory accesses before:", *(f"    {describe(access)}" for access in accesses)]


def _print(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def _print_json(what: object) -> None:
    sys.stdout.write(json_line(msgspec.json.encode(what)).decode())
