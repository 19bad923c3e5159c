"""Asks a process for its health, as `vmibridge health` does."""

import io
import json
import sys
import time
from contextlib import redirect_stdout

from vmibridge.health.ask import ask_health

SECONDS = 60
"""Within which a process comes to what a test waits for, on a machine that is busy."""


def asked(path, check="ready", *, within=float(SECONDS)):
    """The report of one check."""
    told = io.StringIO()
    with redirect_stdout(told):
        status = ask_health(str(path), check, within=within, as_json=True)
    report = json.loads(told.getvalue())
    assert status == (0 if report["ok"] else 1)
    return report


def codes(report):
    return [each["code"] for each in report["reasons"]]


def await_health(path, *wanted, check="ready", within=float(SECONDS), process=None):
    """Ask until the reasons are those, in this order; returns the report."""
    deadline = time.monotonic() + SECONDS
    while True:
        report = asked(path, check, within=within)
        if codes(report) == [*wanted]:
            return report
        if process is not None and process.poll() is not None:
            sys.stdout.write(process.told())
            raise AssertionError(f"it has ended with {process.returncode}: {report}")
        assert time.monotonic() < deadline, report
        time.sleep(0.02)
