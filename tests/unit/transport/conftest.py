"""What the tests of the transport have in common."""

import pytest


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'agent.sock'}"
