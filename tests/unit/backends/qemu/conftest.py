"""What several tests of the backends of QEMU use."""

import pytest
from fake_gdbstub import Stage


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "s")
