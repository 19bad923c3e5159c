"""What a replay found, for people and as JSON.

| | standard output | standard error |
|---|---|---|
| for people | of each file the first difference, findings, counts | what changed, is damaged |
| `--json` | an object for each difference, then the counts | the same |
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.cli.replay_changes import handler_changes
from vmibridge.cli.streams import json_line
from vmibridge.errors import NotReplayedError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Session
from vmibridge.recording.replay.compare import Difference, describe
from vmibridge.recording.replay.options import MISSING, ReplayResult
from vmibridge.recording.replay.verdict import Finding, RequestKind
from vmibridge.text import printable

_MAX_PROBLEMS = 10
_MAX_FINDINGS = 20
"""Findings that are shown of a file."""
_MAX_SHOWN = 200
"""Characters of a text that differs."""


class FileResult(msgspec.Struct):
    """What came of one recording."""

    path: Path
    vms: dict[str, ReplayResult] = {}
    started: int = 0
    """When its first trap was taken, in nanoseconds since the Unix epoch."""
    problems: int = 0
    """What could not be read of it."""
    findings: list[Finding] = []
    findings_left_out: int = 0
    kinds: Mapping[RequestKind, int] = {}
    """Compared requests, where they are counted."""
    error: str | None = None
    """Why it could not be replayed."""

    @property
    def compared(self) -> int:
        """Requests that were compared."""
        return sum(result.compared for result in self.vms.values())

    @property
    def different(self) -> int:
        """Those of them that differ."""
        return sum(result.different for result in self.vms.values())

    @property
    def ignored(self) -> int:
        """Those of them of which nothing differs but what is ignored."""
        return sum(result.ignored for result in self.vms.values())

    @property
    def unchecked(self) -> dict[str, int]:
        """Requests that could not be compared, by the reason."""
        return _sum(result.unchecked for result in self.vms.values())

    @property
    def outside(self) -> dict[str, int]:
        """How often functions were called that `vmi.outside` found nothing for, by key."""
        return _sum(result.outside for result in self.vms.values())


class ReplayPrinter:
    """Tells what a replay finds."""

    def __init__(self, *, as_json: bool, several: bool = False) -> None:
        """`several`: recordings are replayed, and not one."""
        self._as_json = as_json
        self._several = several
        self._logged: set[str] = set()

    def difference(self, path: Path, difference: Difference) -> None:
        """One request of a file was answered in another way."""
        if self._as_json:
            of = {"file": str(path)} if self._several else {}
            _print_json({"difference": difference, **of})

    def changes(
        self,
        session: Session | None,
        handlers: Iterable[BridgeHandler[Any]],
        *,
        has_config: bool,
    ) -> None:
        """Which handlers are not the ones that were recorded. `has_config`: there is a file."""
        for text in handler_changes(session, handlers, has_config=has_config):
            self._warn(text)

    def problems(self, reader: RecordingReader) -> None:
        """What could not be read of the file."""
        for problem in reader.problems[:_MAX_PROBLEMS]:
            self._warn(f"{reader.path}: {problem}")

    def failed(self, why: str) -> None:
        """One of several recordings could not be replayed."""
        self._warn(why)

    def accepted(self, count: int, target: Path) -> None:
        """A new recording was made."""
        self._warn(f"{target}: a new recording, with {count} answers of now")

    def file(self, result: FileResult) -> None:
        """What came of one recording."""
        if self._as_json:
            if self._several:
                _print_json({"file": {"path": str(result.path), **_counts([result])}})
            return
        firsts = [each.first for each in result.vms.values() if each.first is not None]
        if firsts:
            first = min(firsts, key=lambda each: each.time)
            _print(*difference_lines(first, result.started), "")
        if result.different > 1:
            _print(*_finding_lines(result), "")
        path = result.path
        _print(f"{path}: {result.compared} requests compared, {result.different} different")
        if result.ignored:
            _print(f"ignored by rules: all that differs of {result.ignored} requests")
        _print(*(f"not compared: {count} ({why})" for why, count in result.unchecked.items()))
        _print(
            *(
                f"outside {key!a} was not in the recording; it was called ({count} times)"
                for key, count in result.outside.items()
            )
        )

    def end(
        self,
        results: Sequence[FileResult],
        *,
        strict: bool,
        least: float | None,
        selects: bool,
        accepts: bool,
    ) -> int:
        """Tell the sums; returns the exit status.

        Raises `NotReplayedError`, after the counts, when there was nothing to compare: a check
        that looks at the status alone must not take that for success. `selects`: a file may have
        nothing to compare. `accepts`: what is different was accepted. `least`: percent.
        """
        counts = _counts(results)
        compared, different = counts["compared"], counts["different"]
        unchecked: dict[str, int] = counts["unchecked"]
        missing = counts["problems"] + sum(unchecked.get(why, 0) for why in MISSING)
        total = compared + sum(unchecked.values())
        share = 100 * compared / total if total else 0.0
        too_few = least is not None and share < least
        failed = [each for each in results if each.error is not None]
        empty = [each for each in results if each.error is None and not each.compared]
        bad = len(failed) + (0 if selects else len(empty))
        same = compared > 0 and not (different or bad or too_few or (strict and missing))
        if self._as_json:
            _print_json({"replay": {**counts, "same": same}})
        elif self._several:
            _print(
                f"{len(results)} recordings: {compared} requests compared, {different} different"
            )
        if strict and missing and not self._as_json:
            _print("strict: parts of the recording are missing")
        if too_few:
            self._warn(f"{share:.1f} % of {total} requests were compared; {least:g} % are required")
        if not compared:
            what = results[0].path if len(results) == 1 else f"{len(results)} recordings"
            raise NotReplayedError(f"{what}: no request could be compared")
        for each in empty if not selects and self._several else ():
            self._warn(f"{each.path}: no request could be compared")
        if (different and not accepts) or too_few or (strict and missing):
            return 1
        return 2 if bad else 0

    def _warn(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            sys.stderr.write(f"vmibridge: {printable(text)}\n")


def _counts(results: Sequence[FileResult]) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "compared": sum(each.compared for each in results),
        "different": sum(each.different for each in results),
        "ignored": sum(each.ignored for each in results),
        "unchecked": _sum(each.unchecked for each in results),
        "outside": _sum(each.outside for each in results),
        "problems": sum(each.problems for each in results),
        "findings": [finding for each in results for finding in each.findings],
    }
    failed = [each.error for each in results if each.error is not None]
    return {**counts, "failed": failed} if failed else counts


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


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
        expected, got = around(field.expected, field.got)
        lines += [f"  {field.field:<9} expected  {expected}", f"            got       {got}"]
        if field.paths and field.paths != ("output",):
            lines.append(f"            differs   {', '.join(field.paths)}")
    lines += _access_lines(difference.accesses)
    return lines


def around(expected: str, got: str) -> tuple[str, str]:
    """Two texts, each cut to the part where they begin to differ."""
    if len(expected) <= _MAX_SHOWN and len(got) <= _MAX_SHOWN:
        return expected, got
    pairs = zip(expected, got, strict=False)
    place = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    at = min(len(expected), len(got)) if place is None else place
    first = max(0, at - _MAX_SHOWN // 4)
    front = "..." if first else ""
    cut = (text[first : first + _MAX_SHOWN] for text in (expected, got))
    one, other = (
        f"{front}{part}{'...' if first + len(part) < len(text) else ''}"
        for part, text in zip(cut, (expected, got), strict=True)
    )
    return one, other


def finding_line(finding: Finding) -> str:
    """One finding in one line."""
    name = finding.method if finding.handler is None else f"{finding.handler}/{finding.method}"
    requests = "1 request" if finding.count == 1 else f"{finding.count} requests"
    where = f"{'at' if finding.count == 1 else 'from'} trap {finding.seq} of vm {finding.vm}"
    expected, got = around(finding.expected, finding.got)
    line = f"{name} {finding.field}: {requests}, {where}: expected {expected}, got {got}"
    if finding.count > 1 and finding.step is not None:
        line += f"; {finding.step:+d} in each"
    return line


def _finding_lines(result: FileResult) -> list[str]:
    shown = result.findings[:_MAX_FINDINGS]
    count = len(result.findings) + result.findings_left_out
    lines = [
        "1 finding:" if count == 1 else f"{count} findings, the one that began first in front:"
    ]
    lines += [f"  {finding_line(finding)}" for finding in shown]
    if count > len(shown):
        lines.append(f"  {count - len(shown)} more")
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
