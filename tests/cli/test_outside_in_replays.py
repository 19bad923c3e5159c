"""`vmibridge replay` of handlers that get things from outside, of files and of pipes."""

import json

import anyio
import pytest
from children import run as run_child
from probe_guest import command

from vmibridge import Bridge, BridgePacket, BridgeServer
from vmibridge.config import load_handlers
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest

HANDLER = """
from pathlib import Path

import anyio
from vmibridge import BridgeHandler, BridgeResponse, method

class Asks(BridgeHandler[int]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100

    @method(1)
    async def look_up(self, vmi, packet):
        async def look():
            await anyio.sleep(0.01)
            with Path(FILE).open("a") as file:
                file.write("looked up\\n")
            return packet.value1 + 1
        return BridgeResponse(await vmi.outside("number", look))
"""


@pytest.fixture
def outside(tmp_path):
    """What the handler writes to."""
    return tmp_path / "outside.txt"


@pytest.fixture
def source(tmp_path, outside):
    path = tmp_path / "asks.py"
    path.write_text(HANDLER.replace("FILE", repr(str(outside))))
    return path


@pytest.fixture
def recording(tmp_path, source, outside):
    path = tmp_path / "run.mcap"

    async def guest(vm):
        for value in range(3):
            await vm.call(BridgePacket(0x42494D56, 0x0100, 1, value))

    async def main():
        async with Recorder(path) as recorder, FakeGuest(guest, vm="vm") as vm:
            bridge = Bridge(*load_handlers([str(source)]))
            async for _ in BridgeServer(vm, bridge, taps=[recorder]).run():
                pass

    anyio.run(main)
    assert outside.read_text() == 3 * "looked up\n"
    outside.unlink()
    return path


def test_what_was_got_then_is_not_got_again(vmibridge, recording, source, outside):
    for more in ([], ["--no-outside"], ["--strict"], ["--async-backend", "trio"]):
        done = vmibridge("replay", str(recording), "--handlers", source, *more)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{recording}: 3 requests compared, 0 different\n"
    assert not outside.exists()


class TestWhatIsNotInTheRecording:
    @pytest.fixture(autouse=True)
    def changed(self, recording, source):
        source.write_text(source.read_text().replace('"number"', '"other"'))

    def test_is_called_and_told(self, vmibridge, recording, source, outside):
        done = vmibridge("replay", str(recording), "--handlers", source)
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert lines[3:5] == [
            "  outside   expected  'number': in the recording, and not called",
            "            got       'other': it is not in the recording, and was called",
        ]
        assert lines[-2:] == [
            f"{recording}: 3 requests compared, 3 different",
            "outside 'other' was not in the recording; it was called 3 times",
        ]
        assert outside.read_text() == 3 * "looked up\n"
        done = vmibridge("replay", str(recording), "--handlers", source, "--json")
        assert json.loads(done.stdout.splitlines()[-1])["replay"]["outside"] == {"other": 3}

    def test_is_refused_with_no_outside(self, vmibridge, recording, source, outside):
        done = vmibridge("replay", str(recording), "--handlers", source, "--no-outside")
        assert done.returncode == 1
        assert "'other': it is not in the recording, and was refused" in done.stdout
        assert "Asks/look_up outside: 3 requests" in done.stdout.replace("asks/", "Asks/")
        assert not outside.exists()


def test_what_is_not_called_any_more_is_a_difference(vmibridge, recording, source):
    source.write_text(
        source.read_text().replace('await vmi.outside("number", look)', "await look()")
    )
    done = vmibridge("replay", str(recording), "--handlers", source)
    assert done.returncode == 1
    assert "3 requests, from trap 1 of vm vm: expected 'number': in the" in done.stdout
    done = vmibridge("replay", str(recording), "--handlers", source, "--ignore", "outside")
    assert done.returncode == 0


class TestStandardInput:
    """In processes of their own: it is read once."""

    @pytest.mark.parametrize(
        "line",
        [
            'cat run.mcap | "$@" -',
            '"$@" - < run.mcap',
            '"$@" <(cat run.mcap)',
            'mkfifo pipe; cat run.mcap > pipe & "$@" pipe',
        ],
        ids=["pipe", "file", "substitution", "fifo"],
    )
    def test_is_replayed(self, recording, source, tmp_path, line):
        words = command("replay", "--handlers", str(source), "--no-outside", "--")
        done = run_child(["bash", "-o", "pipefail", "-c", line, "sh", *words], cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(": 3 requests compared, 0 different\n")

    def test_is_accepted(self, recording, source, tmp_path):
        source.write_text(source.read_text().replace("+ 1", "+ 2").replace('"number"', '"n"'))
        words = command("replay", "-", "--handlers", str(source), "--accept", "-o", "new.mcap")
        line = ["bash", "-o", "pipefail", "-c", 'cat run.mcap | "$@"', "sh", *words]
        done = run_child(line, cwd=tmp_path)
        assert done.returncode == 0
        again = command("replay", "new.mcap", "--handlers", str(source), "--no-outside")
        assert run_child(again, cwd=tmp_path).stdout.endswith("3 requests compared, 0 different\n")

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ('echo nonsense | "$@" -', "-: is not an MCAP file"),
            ('echo nonsense | "$@" - --break 1', "--break is answered on standard input"),
            ('"$@" --no-such', "Unknown option: --no-such"),
            ('"$@" --no-such run.mcap', "Unknown option: --no-such"),
        ],
        ids=["nonsense", "break", "option", "option-first"],
    )
    def test_that_cannot_be_replayed_is_told(self, source, tmp_path, line, told):
        words = command("replay", "--handlers", str(source))
        done = run_child(["bash", "-c", line, "sh", *words], cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert told in done.stderr
        assert "Traceback" not in done.stderr
