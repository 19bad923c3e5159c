"""`vmibridge edit`, `diff` and `import`, and `-` for each command that reads recordings."""

import json
import os
import signal
import subprocess
import sys

import pytest
from children import run as run_child
from probe_guest import command
from recorded_messages import read
from recorded_session import record, reply, session, trap, write_file

from vmibridge.cli import main
from vmibridge.cli.trap_line import TrapLine
from vmibridge.recording.export.jsonl import TrapRecord
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import NOTE, REPLY, SESSION, TRAP, Note

OF_A_RUN = json.dumps(dict.fromkeys(TrapLine.__struct_fields__) | {"seq": 1, "trap": "vmcall"})
OF_A_LISTING = json.dumps(
    dict.fromkeys(TrapRecord.__struct_fields__) | {"seq": 1, "trap": "vmcall"}
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.mcap"
    record(path)
    return path


@pytest.fixture
def run(recorded, tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in a folder with `run.mcap`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.mcap").symlink_to(recorded)

    def run(*words):
        capsys.readouterr()
        status = main([*words])
        told = capsys.readouterr()
        return status, told.out.splitlines(), told.err.splitlines()

    return run


class TestEdit:
    def test_cuts_merges_and_splits(self, run, tmp_path):
        status, _, told = run("edit", "run.mcap", "--split", "vm", "-o", "part.mcap")
        assert (status, len(told)) == (0, 2)
        assert told[0].startswith("part-1.mcap: 1 session, 17 traps, ")
        assert told[0].endswith("; VMs: red")
        assert run("edit", "part-1.mcap", "part-2.mcap", "-o", "whole.mcap")[0] == 0
        assert read(tmp_path / "whole.mcap") == read(tmp_path / "run.mcap")
        status, out, told = run("edit", "run.mcap", "--vcpu", "1", "--json", "-o", "cut.mcap")
        assert (status, told[-1]) == (0, "9 traps were cut")
        assert json.loads(out[0])["files"]["cut.mcap"]["trap"] == 12
        assert any(
            "is missing" in line or "missing" in line for line in run("inspect", "cut.mcap")[1]
        )

    def test_changes_names_times_and_what_is_in_it(self, run, tmp_path):
        words = ["--rename", "red=green", "--redact", "memory", "--shift", "-1.5", "-o", "x.mcap"]
        assert run("edit", "run.mcap", *words)[0] == 0
        before, after = read(tmp_path / "run.mcap"), read(tmp_path / "x.mcap")
        assert [time for time, _ in after] == [time - 1_500_000_000 for time, _ in before]
        assert {message.vm for _, message in after} == {"green", "blue"}
        assert all(getattr(message, "data", None) is None for _, message in after)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ([], "name a recording"),
            (["none.mcap"], "No such file"),
            (["text"], "is not an MCAP file"),
            (["run.mcap", "run.mcap"], "has a VM 'red', and so has"),
            (["run.mcap", "--rename", "red"], "is not OLD=NEW"),
            (["run.mcap", "--rename", "gone=x"], "there is no VM 'gone'"),
            (["run.mcap", "--redact", "all"], "is not a redaction"),
            (["run.mcap", "--shift", "soon"], "is not a number of seconds"),
            (["run.mcap", "--shift", "-1e12"], "is not a number of seconds below 4.61169e+09"),
            (["run.mcap", "--shift", "-4e9"], "before 1970"),
            (["run.mcap", "--split", "0"], "is vm, or a number"),
            (["run.mcap", "--split", "0.000001"], "more than 250 files"),
            (["run.mcap", "--vm", "gone"], "no trap matches VM gone; there are VMs blue, red"),
            (["run.mcap", "--bogus"], "Unknown option: --bogus"),
        ],
        ids=str,
    )
    def test_2_for_wrong_usage_in_one_line(self, run, tmp_path, words, told):
        (tmp_path / "text").write_text("no recording")
        status, out, errors = run("edit", *words, "-o", "made.mcap")
        assert (status, out, len(errors)) == (2, [], 1)
        assert told in errors[0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.mcap", "text"]

    def test_says_what_of_a_damaged_recording_is_lost(self, run, recorded, tmp_path):
        (tmp_path / "cut.mcap").write_bytes(recorded.read_bytes()[:-100])
        status, out, told = run("edit", "cut.mcap", "--json", "-o", "part.mcap")
        assert status == 0
        assert told[1].startswith("cut.mcap: at byte ")
        assert told[1].endswith("the file ends here: it is truncated, or was not finished")
        assert told[2] == "what could not be read is not in what was made; a note in it says so"
        found = json.loads(out[0])
        assert (found["problem_count"], found["problems"]) == (1, [told[1]])

    def test_writes_over_nothing(self, run, tmp_path):
        status, _, errors = run("edit", "run.mcap", "-o", "run.mcap")
        assert (status, len(errors)) == (2, 1)
        assert "already exists" in errors[0]


class TestDiff:
    def test_0_when_they_are_equal(self, run):
        assert run("diff", "run.mcap", "run.mcap") == (
            0, ["19 requests compared, 0 different"], []
        )  # fmt: skip

    def test_1_when_they_differ(self, run, tmp_path):
        messages = read(tmp_path / "run.mcap")
        write_file(tmp_path / "less.mcap", messages[:30])
        write_file(tmp_path / "a.mcap", [(1, trap(1)), (2, reply(1, output="1"))])
        write_file(tmp_path / "b.mcap", [(1, trap(1)), (2, reply(1, output='"\u202e"'))])
        assert run("diff", "run.mcap", "less.mcap")[0] == 1
        status, out, _ = run("diff", "a.mcap", "b.mcap")
        assert (status, out) == (1, [
            (
                "probe 0x0001/0x0001: output differs in 1 request; the first: VM vm, vCPU 0,"
                " trap 1 of a.mcap, trap 1 of b.mcap"
            ),
            "  a.mcap: 1",
            '  b.mcap: "\\u202e"',
            "1 request compared, 1 different",
        ])  # fmt: skip
        assert run("diff", "a.mcap", "b.mcap", "--ignore", "output")[0] == 0
        status, out, _ = run("diff", "a.mcap", "b.mcap", "--json")
        found = json.loads(out[0])
        assert (found["same"], found["different"], found["groups"][0]["field"]) == (
            False, 1, "output"
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["run.mcap", "empty.mcap"], "nothing was compared: there is no request in empty.mcap"),
            (["run.mcap", "cut.mcap"], "could not be read whole"),
            (["run.mcap", "none.mcap"], "No such file"),
            (["run.mcap", "run.mcap", "--vm", "gone"], "nothing was compared: run.mcap: no trap"),
            (["run.mcap", "run.mcap", "--ignore", "time"], "there are registers, outcome"),
            (["run.mcap", "run.mcap", "--rename", "gone=x"], "there is no VM 'gone'; there are"),
            (["run.mcap", "run.mcap", "--rename", "red=blue"], "'red' and 'blue' would be called"),
            (["-", "-"], "one of the two"),
        ],
        ids=str,
    )
    def test_2_when_nothing_can_be_said(self, run, recorded, tmp_path, words, told):
        write_file(tmp_path / "empty.mcap", [(1, session())])
        (tmp_path / "cut.mcap").write_bytes(recorded.read_bytes()[:-1])
        status, _, errors = run("diff", *words)
        assert status == 2
        assert told in errors[-1]


class TestImport:
    def test_makes_a_recording_of_an_export(self, run, tmp_path):
        assert run("export", "run.mcap", "--to", "jsonl")[0] == 0
        status, out, told = run("import", "run.jsonl", "-o", "again.mcap")
        assert (status, out) == (0, [])
        counts = "2 sessions, 21 traps, 21 memory accesses, 21 replies, 4 notes, 6 steps"
        assert told == [f"again.mcap: {counts}"]
        assert read(tmp_path / "again.mcap") == read(tmp_path / "run.mcap")

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "x.jsonl: has no line of a recording"),
            ('{"seq":1,"trap":"msr"}\nnonsense\n', "x.jsonl: line 2: "),
            (
                '{"a":1}',
                "line 1: is neither a trap nor a message of a recording; 'vmibridge export",
            ),
            (OF_A_RUN, "line 1: is of a server's --json, without registers and memory; record"),
            (OF_A_LISTING, "line 1: is of 'vmibridge inspect --json' without --full, so without"),
            (None, "x.jsonl: No such file"),
        ],
    )
    def test_2_for_a_wrong_line(self, run, tmp_path, text, told):
        if text is not None:
            (tmp_path / "x.jsonl").write_text(text)
        status, out, errors = run("import", "x.jsonl", "-o", "x.mcap")
        assert (status, out, len(errors)) == (2, [], 1)
        assert told in errors[0]
        assert not (tmp_path / "x.mcap").exists()


class TestPipes:
    """In processes of their own: standard input is read once."""

    @pytest.mark.no_cover
    def test_lead_from_command_to_command(self, recorded, tmp_path):
        words = [
            ["edit", str(recorded), "--rename", "red=green", "-o", "-"],
            ["export", "-", "--to", "jsonl", "-o", "-"],
            ["import", "-", "-o", "-"],
            ["recover", "-", "-o", "-"],
            ["edit", "-", "--rename", "green=red", "-o", "-"],
            ["diff", "-", str(recorded)],
        ]
        line = " | ".join(f'"$@" {" ".join(each)}' for each in words)
        done = run_child(["bash", "-o", "pipefail", "-c", line, "sh", *command()], cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "19 requests compared, 0 different\n"), done
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "start"),
        [
            (["inspect", "-"], b"vm red"),
            (["report", "-", "-o", "-"], b"<!doctype html>"),
            (["export", "-", "--to", "perfetto", "-o", "-"], b"\n"),
        ],
        ids=lambda words: words[0] if isinstance(words, list) else "",
    )
    def test_are_read_and_written(self, recorded, words, start):
        with recorded.open("rb") as file:
            data = file.read()
        done = subprocess.run(
            command(*words), input=data, capture_output=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.lower().startswith(start)
        assert b"Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["inspect", "-"], "-: is not an MCAP file"),
            (["edit", "-", "-o", "x.mcap"], "-: is not an MCAP file"),
            (["import", "-", "-o", "x.mcap"], "standard input: line 1: "),
            (["export", "-", "--to", "jsonl"], "name the file to make"),
            (["report", "-"], "name the page to make"),
            (["inspect", "--follow", "-"], "is for a file that is being written"),
        ],
        ids=str,
    )
    @pytest.mark.no_cover
    def test_that_have_something_else_are_told(self, vmibridge, words, told):
        read, write = os.pipe()
        os.write(write, b"nonsense\n")
        os.close(write)
        with os.fdopen(read) as pipe:
            done = vmibridge(*words, stdin=pipe)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert told in line


class TestFollow:
    """A recording that grows."""

    @pytest.fixture
    def growing(self, tmp_path):
        writer = RecordingWriter(tmp_path / "run.mcap", "tests")

        def write(*messages):
            chunk = ChunkBuilder()
            for channel, message in messages:
                chunk.add(channel.id, 1, message)
            writer.add(chunk.pack())

        write((SESSION, session()), (TRAP, trap(1)), (REPLY, reply(1)))
        yield writer, write
        writer.close()

    def test_shows_what_comes_and_ends_with_the_recording(self, growing, children, tmp_path):
        writer, write = growing
        child = children.start(command("inspect", "--follow", "run.mcap"), cwd=tmp_path)
        for _ in range(5):
            line = child.stdout.readline()
        assert line.split()[1] == "1"
        for seq in (2, 3):
            write((TRAP, trap(seq)), (REPLY, reply(seq)))
            assert child.stdout.readline().split()[1] == str(seq)
        write((NOTE, Note("end", "3 traps", "vm")))
        writer.finish()
        assert child.stdout.read() == "3 traps: 3 handled\n"
        assert child.wait() == 0

    def test_ends_when_its_writer_has_gone(self, growing, children, tmp_path):
        writer, _ = growing
        child = children.start(command("inspect", "--follow", "run.mcap"), cwd=tmp_path)
        for _ in range(5):
            child.stdout.readline()
        writer.close()
        assert "the file is truncated" in child.stdout.read()
        assert child.wait() == 0

    def test_ends_when_it_is_stopped(self, growing, children, tmp_path):
        child = children.start(command("inspect", "--follow", "run.mcap"), cwd=tmp_path)
        for _ in range(5):
            child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", "")
        assert child.returncode == 130

    def test_without_it_the_file_is_said_to_be_written(
        self, growing, monkeypatch, tmp_path, capsys
    ):
        monkeypatch.chdir(tmp_path)
        assert main(["inspect", "run.mcap"]) == 0
        *_, counts, hint = capsys.readouterr().out.splitlines()
        assert counts == "1 trap: 1 handled"
        assert hint == (
            "the file is being written: vmibridge inspect --follow run.mcap shows what comes"
        )
        assert main(["inspect", "run.mcap", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
        assert (summary["being_written"], summary["truncated"]) == (True, False)


def test_a_pipe_with_a_name_is_read(recorded, tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"open({str(fifo)!r}, 'wb').write(open({str(recorded)!r}, 'rb').read())",
        ]
    ) as writer:
        assert main(["inspect", str(fifo)]) == 0
        assert writer.wait() == 0
    assert "21 traps: " in capsys.readouterr().out
