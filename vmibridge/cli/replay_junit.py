"""The result of a replay as JUnit XML, which servers of continuous integration read.

| element | is |
|---|---|
| `testsuite` | a recording |
| `testcase` | the requests of one method of one handler |
| `failure` | its findings, unless they are accepted |
| `skipped` | why requests were not compared |
| `error` | why a recording could not be replayed |
"""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from vmibridge.recording.replay.file_result import FileResult, finding_line
from vmibridge.recording.replay.verdict import Finding, RequestKind
from vmibridge.text import counted, printable

_MAX_TEXT = 10_000


def junit_report(results: Sequence[FileResult], *, accepts: bool) -> bytes:
    """The file, as UTF-8. `accepts`: what is different was accepted."""
    suites = Element("testsuites", name="vmibridge replay")
    for result in results:
        _add_suite(suites, result, accepts=accepts)
    for name in ("tests", "failures", "errors", "skipped"):
        suites.set(name, str(sum(int(suite.get(name, "0")) for suite in suites)))
    report: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return report


def _add_suite(suites: Element, result: FileResult, *, accepts: bool) -> None:
    suite = SubElement(suites, "testsuite", name=_text(str(result.path)))
    failures = errors = skipped = 0
    findings: dict[RequestKind, list[Finding]] = {}
    for finding in () if accepts else result.findings:
        findings.setdefault(RequestKind(finding.handler, finding.method), []).append(finding)
    for kind, count in result.kinds.items():
        case = _add_case(suite, kind.handler or "unmatched", kind.method)
        SubElement(case, "system-out").text = f"{counted(count, 'request')} compared"
        found = findings.pop(kind, None)
        if found:
            _add_failure(case, found)
            failures += 1
    for kind, left in findings.items():
        # Too many kinds were counted, or a handler took what none took then.
        _add_failure(_add_case(suite, kind.handler or "unmatched", kind.method), left)
        failures += 1
    for why, count in result.unchecked.items():
        case = _add_case(suite, "not compared", why)
        SubElement(case, "skipped", message=_text(f"{counted(count, 'request')}: {why}"))
        skipped += 1
    if result.error is not None or not result.compared:
        why = result.error or "no request could be compared"
        case = _add_case(suite, "not replayed", str(result.path))
        SubElement(case, "error", message=_text(why))
        errors += 1
    counts = {"tests": len(suite), "failures": failures, "errors": errors, "skipped": skipped}
    for name, count in counts.items():
        suite.set(name, str(count))


def _add_case(suite: Element, group: str, name: str) -> Element:
    return SubElement(suite, "testcase", classname=_text(group), name=_text(name))


def _add_failure(case: Element, found: Sequence[Finding]) -> None:
    lines = [_text(finding_line(each)) for each in found]
    failure = SubElement(case, "failure", message=lines[0])
    failure.text = "\n".join(lines)[:_MAX_TEXT]


def _text(text: str) -> str:
    # XML has no way to say most control characters.
    return printable(text)[:_MAX_TEXT]
