"""Every test that touches an event loop runs on each loop that users may choose."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from nats_parts import nats_server

ROOT = Path(__file__).parents[1]
UNPACKED = ROOT / ".qemu/qemu-system-x86_64"


def pytest_configure() -> None:
    """No law depends on how busy the machine is. The rest is as hypothesis has it, in CI too."""
    name = "untimed"
    settings.register_profile(
        name, settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile(name)


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request):
    return request.param


def new_enough(path: str) -> bool:
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", told)
    return version is not None and (int(version[1]), int(version[2])) >= (11, 1)


@pytest.fixture(scope="session")
def qemu() -> str:
    """A QEMU that has plugins which may write registers."""
    if given := os.environ.get("VMIBRIDGE_QEMU"):
        assert new_enough(given), f"VMIBRIDGE_QEMU={given} is no QEMU of 11.1 or newer"
        return given
    system = shutil.which("qemu-system-x86_64")
    for path in (str(UNPACKED), system):
        if path and os.access(path, os.X_OK) and new_enough(path):
            return path
    if not os.environ.get("CI"):
        pytest.skip("no QEMU of 11.1 or newer: run `make qemu`, or set VMIBRIDGE_QEMU")
    subprocess.run([ROOT / "guest/qemu/fetch-qemu"], check=True, timeout=600)
    return str(UNPACKED)


@pytest.fixture
def nats(tmp_path):
    """A NATS server of its own, without passwords."""
    with nats_server(tmp_path) as server:
        yield server
