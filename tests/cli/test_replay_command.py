"""`vmibridge replay`: a real guest, recorded on one loop, asked again on the other."""

import json
import os
import pty
from pathlib import Path

import anyio
import pytest
from probe_guest import calls, command

from vmibridge import Bridge, BridgeServer, open_backend
from vmibridge.config import load_handlers
from vmibridge.recording.recorder import Recorder

MEMORY_HANDLER = '''
from vmibridge import BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler[int]):
    """Reads, writes, and counts."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    count = 0

    @method(1)
    async def sum(self, vmi, packet):
        self.count += 1
        data = await vmi.memory.read(packet.value1, 16)
        await vmi.memory.write(packet.value1 + 0x100000, data[::-1])
        return BridgeResponse(value1=sum(data) + self.count)

    @method(2)
    async def fail(self, vmi, packet):
        raise RuntimeError("told to,\\x1b[2J twice")
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "probe_memory.py"
    path.write_text(MEMORY_HANDLER)
    return path


@pytest.fixture
def record(tmp_path, image, source):
    """`record(loop, CODE)` runs a guest with the handler, and gives the path of the file."""

    def record(loop="asyncio", code=None):
        guest = image(code or calls(*[1] * 40, value="0x100000") + "\nhlt")
        path = tmp_path / f"{loop}.mcap"

        async def main():
            async with Recorder(path) as recorder, open_backend(f"unicorn:{guest}") as backend:
                bridge = Bridge(*load_handlers([str(source)]))
                async for _ in BridgeServer(backend, bridge, taps=[recorder]).run():
                    pass

        anyio.run(main, backend=loop)
        return str(path)

    return record


@pytest.mark.parametrize(("then", "now"), [("asyncio", "trio"), ("trio", "asyncio")])
@pytest.mark.parametrize("options", [[], ["--strict"], ["--order", "vcpu"]], ids=" ".join)
def test_unchanged_handlers_answer_the_same_on_the_other_loop(
    vmibridge, record, source, then, now, options
):
    path = record(then)
    done = vmibridge("replay", path, "--handlers", source, "--async-backend", now, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: 40 requests compared, 0 different\n"


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_changed_handler_is_caught_at_its_trap(vmibridge, record, source, loop):
    path = record()
    source.write_text(
        MEMORY_HANDLER.replace(
            "sum(data) + self.count", "sum(data) + self.count + (self.count == 17)"
        )
    )
    done = vmibridge("replay", path, "--handlers", source, "--async-backend", loop)
    assert done.returncode == 1
    told = done.stdout.splitlines()
    assert told[0].startswith("first difference: trap 17 of vm vm, vcpu 0, ")
    assert told[1] == "  asked     magic 0x42494d56 request 0x0100 method 0x0001"
    assert told[2] == "  values    0x100000 0x0 0x0 0x0"
    then, now = told[3].split(), told[4].split()
    assert then[:2] == ["value1", "expected"]
    assert int(now[1], 0) == int(then[2], 0) + 1
    assert told[6].startswith("    read of 16 bytes at 0x100000: 41 b8 00 00 10 00")
    assert told[7].startswith("    write of 16 bytes at 0x200000: ")
    assert told[-1] == f"{path}: 40 requests compared, 1 different"
    other_loop = (
        "vmibridge: vm vm: it was recorded on asyncio, and handlers may go on in other steps on"
        " trio: replay it on asyncio to see what is different there, too\n"
    )
    assert done.stderr == (other_loop if loop == "trio" else "") + (
        "vmibridge: handler probe: probe_memory.py has changed since the recording\n"
    )


def test_json_has_every_difference_and_the_counts(vmibridge, record, source):
    path = record()
    source.write_text(MEMORY_HANDLER.replace("data[::-1]", "data"))
    done = vmibridge("replay", path, "--handlers", source, "--json")
    assert done.returncode == 1
    *differences, last = map(json.loads, done.stdout.splitlines())
    assert [each["difference"]["seq"] for each in differences] == list(range(1, 41))
    first = differences[0]["difference"]
    assert [field["field"] for field in first["fields"]] == ["write"]
    (finding,) = last["replay"].pop("findings")
    assert (finding["field"], finding["count"], finding["seq"]) == ("write", 40, 1)
    assert last == {
        "replay": {
            "compared": 40,
            "different": 40,
            "ignored": 0,
            "unchecked": {},
            "outside": {},
            "problems": 0,
            "same": False,
        }
    }


def test_what_a_guest_says_reaches_no_terminal_as_it_is(vmibridge, record, source):
    path = record(code=calls(2))
    source.write_text(MEMORY_HANDLER.replace("RuntimeError(", "ValueError("))
    done = vmibridge("replay", path, "--handlers", source)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert "ValueError: told to,\\x1b[2J twice" in done.stdout.replace("\\\\", "\\")


class TestAFileInParts:
    @pytest.fixture
    def truncated(self, record):
        path = record()
        file = Path(path)
        # Behind the traps, and before what tells that nothing is missing.
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
        return path

    def test_is_replayed_as_far_as_it_goes(self, vmibridge, truncated, source):
        done = vmibridge("replay", truncated, "--handlers", source)
        assert done.returncode == 0
        assert "the file ends here: it is truncated" in done.stderr
        clean = f"{truncated.removesuffix('.mcap')}-clean.mcap"
        recover = f"what can be read of it: vmibridge recover {truncated} -o {clean}"
        assert f"the file is truncated; {recover}" in done.stderr

    def test_fails_a_strict_replay(self, vmibridge, truncated, source):
        done = vmibridge("replay", truncated, "--handlers", source, "--strict")
        assert done.returncode == 1
        assert "strict: parts of the recording are missing" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["missing.mcap", "--handlers", "{source}"], "missing.mcap: No such file or directory"),
        (["{source}", "--handlers", "{source}"], "is not an MCAP file"),
        (["{path}", "--handlers", "none.py"], "there is no such file, folder or module"),
        (["{path}", "--handlers", "{broken}"], "SyntaxError"),
        (["{path}", "--handlers", "{source}", "--vm", "other"], "there are VMs vm"),
        (["{path}", "--handlers", "{source}", "--speed", "-1"], "speed=-1.0"),
        (["{path}", "--handlers", "{source}", "--timeout", "0"], "timeout"),
    ],
)
def test_what_cannot_be_compared_is_status_2_and_one_line(
    vmibridge, record, source, tmp_path, options, told
):
    broken = tmp_path / "broken.py"
    broken.write_text("def (")
    names = {"path": record(), "source": str(source), "broken": str(broken)}
    done = vmibridge("replay", *[option.format(**names) for option in options])
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_recording_is_a_backend_like_any_other(vmibridge, record, source):
    path = record()
    done = vmibridge("run", "--backend", f"box=replay:{path}", "--handlers", source, "--json")
    assert done.returncode == 0, done.stderr
    *traps, last = map(json.loads, done.stdout.splitlines())
    assert [trap["seq"] for trap in traps] == list(range(1, 41))
    assert {trap["vm"] for trap in traps} == {"box"}
    assert last["summary"]["handled"] == 40


def test_long_work_shows_a_bar_on_a_terminal_and_takes_it_away(children, record, source, tmp_path):
    slow = MEMORY_HANDLER.replace("self.count += 1", "self.count += 1; time.sleep(0.02)")
    path = record(code=calls(*[1] * 100, value="0x100000"))
    source.write_text(f"import time\n{slow}")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = children.start(
            command("replay", path, "--handlers", str(source)),
            stderr=theirs,
            text=False,
            cwd=tmp_path,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = terminal.read(4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        told = process.communicate()[0]
    assert b"replaying" in shown
    assert told.endswith(b"100 requests compared, 0 different\n")
