"""Where commands of a document run."""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture
def environment():
    # Without coverage: tests/cli/ gathers that of the commands, which would take twice as long.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "COVERAGE_", "COV_"))
    }
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
