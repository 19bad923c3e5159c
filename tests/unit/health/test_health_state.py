"""What a process says of itself: checks, reasons, reports."""

import msgspec
import pytest

from vmibridge.health import state
from vmibridge.health.state import Health, Reason

LOST = Reason("server-unreachable", "vm web: tcp:h:1: Connection refused")
STARTING = Reason("starting", "vm web: its handlers are being entered", "started")
STUCK = Reason("overdue", "it stops for ever", "live")
KEPT = Reason("reload-failed", "the handlers stay as they are", None)


def health_of(*reasons):
    health = Health()
    health.add(lambda: reasons)
    return health


@pytest.mark.parametrize(
    ("reasons", "passed"),
    [
        ([], ["live", "started", "ready"]),
        ([KEPT], ["live", "started", "ready"]),
        ([LOST], ["live", "started"]),
        ([STARTING], ["live"]),
        ([LOST, STARTING], ["live"]),
        ([STUCK], []),
    ],
    ids=lambda each: ",".join(getattr(r, "code", r) for r in each) or "none",
)
def test_a_reason_fails_its_check_and_those_behind(reasons, passed):
    health = health_of(*reasons)
    for check in ("live", "started", "ready"):
        report = health.report(check)
        assert report.ok == (check in passed)
        found = [name for name in ("live", "started", "ready") if getattr(report, name)]
        assert found == passed


def test_a_line_says_what_failed_first():
    health = health_of(KEPT, LOST)
    assert health.report("ready").line == (
        "not ready: server-unreachable: vm web: tcp:h:1: Connection refused;"
        " reload-failed: the handlers stay as they are"
    )
    assert health.report("live").line.startswith("live; reload-failed: ")
    assert health_of().report("ready").line == "ready"


def test_without_a_part_a_process_starts():
    report = Health().report("ready")
    assert (report.live, report.started) == (True, False)
    assert report.reasons[0].code == "starting"


def test_a_part_that_raises_is_a_reason_and_the_others_are_asked():
    health = health_of(LOST)
    health.add(lambda: 1 // 0)
    assert [each.code for each in health.report("ready").reasons] == [LOST.code, "unknown"]


def test_a_report_is_bounded_and_fit_for_a_terminal():
    hostile = Reason("vm-failed", "a\x1b[2J\n\u202e" + "\U0001f600" * 100_000)
    report = health_of(*[hostile] * 100).report("ready")
    assert len(report.reasons) == 16
    assert report.reasons[-1].text == "85 more reasons"
    assert report.line.isprintable()
    assert len(report.line) < 16 * 400
    assert msgspec.json.encode(report)


def test_a_stop_is_a_reason_and_one_that_lasts_too_long_ends_to_be_live(monkeypatch):
    now = 100.0
    monkeypatch.setattr(state.time, "monotonic", lambda: now)
    health = Health(stop_within=5)
    health.add(tuple)
    health.stop_begins()
    assert [each.code for each in health.report("ready").reasons] == ["stopping"]
    now = 104.0
    health.stop_begins()
    assert health.report("live").ok
    now = 106.0
    report = health.report("live")
    assert not report.ok
    assert report.line.startswith("not live: overdue: it stops for 6 s, 5 were expected")


def test_a_run_that_has_ended_and_does_not_exit_is_overdue_too(monkeypatch):
    now = 0.0
    monkeypatch.setattr(state.time, "monotonic", lambda: now)
    health = Health(stop_within=5)
    health.add(lambda: [Reason("stopping", "every guest has ended")])
    assert health.report("live").ok
    now = 6.0
    assert not health.report("live").ok


def test_a_reload_that_fails_is_told_until_one_succeeds():
    health, seen = health_of(), []
    health.observe(seen.append)
    health.reload_begins()
    health.reload_ends(failed="says.py:1: SyntaxError")
    report = health.report("ready")
    assert report.line == "ready; reload-failed: says.py:1: SyntaxError"
    health.reload_begins()
    health.reload_ends()
    assert health.report("ready").line == "ready"
    assert seen == ["reloading", "reloaded"] * 2
