"""The command as users run it: a process of its own, over an image that nasm assembled."""

import os
import subprocess
from pathlib import Path

import pytest
from probe_guest import HANDLERS, command


@pytest.fixture
def image(tmp_path):
    def build(code, width=64, org=0x100000):
        source = tmp_path / "guest.asm"
        source.write_text(f"bits {width}\norg {org}\n{code}\n")
        target = tmp_path / "guest.bin"
        subprocess.run(["nasm", "-f", "bin", str(source), "-o", str(target)], check=True)
        return str(target)

    return build


@pytest.fixture
def handlers(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text(HANDLERS)
    return str(path)


@pytest.fixture
def vmibridge(tmp_path):
    def run(*arguments, **options):
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
            check=False,
            **options,
        )

    return run


@pytest.fixture
def root():
    return Path(__file__).parents[2]


@pytest.fixture
def unmeasured(monkeypatch):
    """No coverage in the commands that a test runs: it needs room for a file of its own."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)
