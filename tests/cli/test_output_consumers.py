"""Standard output: closed, full, read by nobody, or of an encoding that lacks a character."""

import json
import os
import subprocess
import sys

import pytest
from probe_guest import calls, command

from vmibridge.cli import output
from vmibridge.cli.output import JsonWriter
from vmibridge.text import printable_json

HANDLER = """
from vmibridge import BridgeHandler, BridgeResponse


class Probe(BridgeHandler[str]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = VERIFY_VALUE4 = None

    async def handle(self, vmi, packet):
        output = "e\\u0301 \\u202e \\u2028 \\u0085 \\x7f \\U0001f600"
        return BridgeResponse(value1=1).with_output(output)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text(HANDLER)
    return str(path)


@pytest.fixture
def shell(children, tmp_path, image, source):
    """Runs the command by a shell, which can leave out a stream."""
    guest = image(calls(1))

    def run(redirection, *arguments, **environment):
        words = arguments or ("run", "--backend", f"unicorn:{guest}", "--handlers", source)
        line = ["sh", "-c", f'"$@" {redirection}', "sh", *command(*words)]
        process = children.start(
            line, cwd=tmp_path, env={**os.environ, **environment}, stderr=subprocess.PIPE
        )
        told, errors = process.communicate()
        return process.returncode, told, errors

    return run


class TestNoStandardOutput:
    def test_a_run_goes_on_without_outcomes_and_says_so(self, shell):
        status, _, errors = shell(">&-")
        assert (status, errors) == (0, "vmibridge: standard output is closed: nothing is printed\n")

    def test_other_commands_do_their_work(self, shell, source):
        status, _, errors = shell(">&-", "handlers", "list", source)
        assert (status, errors.count("\n")) == (0, 1)

    def test_neither_stream_is_needed(self, shell):
        assert shell(">&- 2>&-")[0] == 0


class TestAFullDisk:
    def test_drops_the_outcomes_of_a_run_and_counts_them(self, shell):
        status, _, errors = shell(">/dev/full")
        assert status == 0
        assert "No space left on device: outcomes are dropped" in errors
        assert "1 outcome was dropped" in errors  # of one trap: headings and sum are none
        assert "Traceback" not in errors

    @pytest.mark.parametrize("words", [["handlers", "list", "{source}"], ["--version"]])
    def test_is_one_line_of_other_commands(self, shell, source, words):
        status, _, errors = shell(">/dev/full", *[word.format(source=source) for word in words])
        assert (status, errors) == (1, "vmibridge: standard output: No space left on device\n")


class TestCharacters:
    def test_json_has_escapes_for_what_a_terminal_would_obey(self, shell, image, source):
        status, told, _ = shell(
            "", "run", "--backend", f"unicorn:{image(calls(1))}", "--handlers", source, "--json"
        )
        assert status == 0
        assert told.replace("\n", "").isprintable()
        first = json.loads(told.splitlines()[0])
        assert first["output"] == "e\u0301 \u202e \u2028 \u0085 \x7f \U0001f600"

    @pytest.mark.parametrize("as_json", [[], ["--json"]])
    def test_an_encoding_that_lacks_one_gets_an_escape(self, shell, image, source, as_json):
        status, told, _ = shell(
            "",
            "run",
            "--backend",
            f"unicorn:{image(calls(1))}",
            "--handlers",
            source,
            *as_json,
            PYTHONIOENCODING="ascii",
        )
        assert status == 0
        assert told.isascii()
        assert "\\u0301" in told

    @pytest.mark.parametrize("character", ["\u202e", "\u2028", "\x9b", "\x7f", "\U000e0001", "\n"])
    def test_escapes_mean_the_same(self, character):
        line = json.dumps({"a": character, "b": "ä"}, ensure_ascii=False).encode()
        escaped = printable_json(line)
        assert json.loads(escaped) == json.loads(line)
        assert escaped.decode().isprintable()
        assert printable_json(line, ascii_only=True).isascii()


@pytest.mark.anyio
class TestAReaderThatStopsReading:
    @pytest.fixture
    def pipe(self, monkeypatch):
        monkeypatch.setattr(output, "_PATIENCE", 0.01)
        ours, theirs = os.pipe()
        yield ours, theirs
        for each in (ours, theirs):
            os.close(each)

    async def test_loses_whole_lines_and_never_a_part(self, pipe, caplog):
        ours, theirs = pipe
        writer = JsonWriter(theirs)
        lines = [json.dumps({"line": number, "more": "x" * 3000}).encode() for number in range(100)]
        for line in lines:
            await writer.write(line + b"\n")
        assert 0 < writer.dropped < 100
        got = b""
        while not got.endswith(b"\n") or got.count(b"\n") < 100 - writer.dropped:
            got += os.read(ours, 1 << 16)
            await writer.write(b"")
        assert got.splitlines() == lines[: 100 - writer.dropped]
        await writer.write(b"{}\n")
        assert os.read(ours, 100) == b"{}\n"
        told = [record.getMessage() for record in caplog.records]
        assert [text.partition(": ")[2] for text in told] == [
            "not read for 0.01 seconds: outcomes are dropped until they can be written",
            f"{writer.dropped} outcomes were dropped",
        ]

    async def test_ends_the_run_when_it_has_gone(self):
        ours, theirs = os.pipe()
        os.close(ours)
        with pytest.raises(BrokenPipeError):
            await JsonWriter(theirs).write(b"{}\n")
        os.close(theirs)


def test_a_log_that_nobody_reads_holds_no_loop(tmp_path):
    program = """
import logging, os, sys
from vmibridge.cli.logs import log_handler
handler = log_handler("info", None)
logging.getLogger().addHandler(handler)
for number in range(10_000):
    logging.warning("a line of a log that fills the pipe %d", number)
os._exit(0)
"""
    ours, theirs = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stderr=theirs, timeout=60, check=False
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0
