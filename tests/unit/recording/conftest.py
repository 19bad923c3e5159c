"""What the tests of recordings have in common."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"
