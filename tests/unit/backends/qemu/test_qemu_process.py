"""The process of a QEMU, and how it is taken down; QEMU is played by a script."""

import signal
import stat
import sys

import anyio
import pytest

from vmibridge.backends.qemu import process as module
from vmibridge.backends.qemu.process import QemuProcess
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio

FAKE_QEMU = """#!{python}
import json, re, signal, socket, sys
told = sys.argv[1:]
if "silent" in told:
    signal.pause()
if "ends" in told:
    sys.exit(3)
if "stubborn" in told:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
number = int(re.search(r"fd=(\\d+)", " ".join(told))[1])
monitor = socket.socket(fileno=number)
version = {{"qemu": {{"major": 11, "minor": 1, "micro": 0}}}}
monitor.sendall(json.dumps({{"QMP": {{"version": version}}}}).encode() + b"\\n")
for line in monitor.makefile():
    command = json.loads(line)
    if command["execute"] == "quit" and "obeys" not in told:
        reply = {{"error": {{"desc": "no"}}}}
    else:
        reply = {{"return": {{}}}}
    monitor.sendall(json.dumps({{**reply, "id": command["id"]}}).encode() + b"\\n")
    if command["execute"] == "quit" and "obeys" in told:
        sys.exit(0)
signal.pause()
"""


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    path = tmp_path / "qemu"
    path.write_text(FAKE_QEMU.format(python=sys.executable))
    path.chmod(stat.S_IRWXU)
    return str(path)


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("obeys", 0, ""),
        ("refuses", -signal.SIGTERM, "QEMU does not end: terminate"),
        ("stubborn", -signal.SIGKILL, "QEMU does not end: kill"),
    ],
)
async def test_leaving_the_block_ends_it(qemu, how, status, told, caplog):
    with anyio.fail_after(30):
        async with QemuProcess([qemu, how]) as process:
            assert process.qmp.version == (11, 1, 0)
            assert process.process.returncode is None
    assert process.process.returncode == status
    assert told in caplog.text


async def test_a_cancellation_ends_it_too(qemu):
    with anyio.fail_after(30), anyio.CancelScope() as scope:
        async with QemuProcess([qemu, "obeys"]) as process:
            scope.cancel()
            await process.wait()
    assert process.process.returncode == 0


async def test_one_that_ends_at_once_has_its_status_and_no_monitor(qemu):
    with anyio.fail_after(30):
        async with QemuProcess([qemu, "ends"]) as process:
            assert (process.qmp, await process.wait()) == (None, 3)


async def test_one_without_a_monitor_is_an_error(qemu, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    monkeypatch.setattr("vmibridge.backends.qemu.qmp._TIMEOUT", 0.2)
    with anyio.fail_after(30), pytest.raises(BackendError, match="no QMP monitor"):
        await QemuProcess([qemu, "silent"]).__aenter__()


async def test_one_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BackendError, match="/none: No such file or directory"):
        await QemuProcess([str(tmp_path / "none")]).__aenter__()
