"""What came of the replay of one recording, and how it is told to people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from vmibridge.recording.messages import MemoryAccess
from vmibridge.recording.replay.compare import Difference, describe
from vmibridge.recording.replay.options import ReplayResult
from vmibridge.recording.replay.verdict import Finding, RequestKind
from vmibridge.text import counted

__all__ = ["FileResult", "around", "counts_of", "difference_lines", "finding_line", "result_lines"]

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
        return counts_of(result.unchecked for result in self.vms.values())


def result_lines(result: FileResult) -> list[str]:
    """The first difference with what led to it, then the findings, then the counts."""
    lines: list[str] = []
    firsts = [each.first for each in result.vms.values() if each.first is not None]
    if firsts:
        first = min(firsts, key=lambda each: each.time)
        lines += [*difference_lines(first, result.started), ""]
    if result.different > 1:
        lines += [*_finding_lines(result), ""]
    requests = counted(result.compared, "request")
    lines.append(f"{result.path}: {requests} compared, {result.different} different")
    if result.ignored:
        requests = counted(result.ignored, "request")
        lines.append(f"ignored by rules: all differences of {requests}")
    lines += [f"not compared: {count} ({why})" for why, count in result.unchecked.items()]
    return lines


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
    requests = counted(finding.count, "request")
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
        "1 finding:"
        if count == 1
        else f"{counted(count, 'finding')}, the one that began first in front:"
    ]
    lines += [f"  {finding_line(finding)}" for finding in shown]
    if count > len(shown):
        lines.append(f"  {count - len(shown)} more")
    return lines


def _access_lines(accesses: Sequence[MemoryAccess]) -> list[str]:
    if not accesses:
        return ["  it accessed no memory before"]
    return ["  memory accesses before:", *(f"    {describe(access)}" for access in accesses)]


def counts_of(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by their names."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
