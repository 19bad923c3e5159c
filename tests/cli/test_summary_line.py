"""The last line of a run, for people."""

import pytest

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.cli.trap_line import summary_text
from vmibridge.engine.summary import Summary


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (
            1,
            (
                "1 trap: 1 handled, 1 not ours, 1 result not collected, 1 handler abandoned,"
                " the loop was held up 1 time"
            ),
        ),
        (
            2,
            (
                "2 traps: 2 handled, 2 not ours, 2 results not collected, 2 handlers abandoned,"
                " the loop was held up 2 times"
            ),
        ),
    ],
)
def test_counts_one_and_several(count, line):
    summary = Summary(native=count, uncollected=count, abandoned=count, blocked=count)
    summary.outcomes[OutcomeKind.HANDLED] = count
    assert summary_text(summary) == line


def test_says_that_there_was_none():
    assert summary_text(Summary()) == "0 traps: none"
