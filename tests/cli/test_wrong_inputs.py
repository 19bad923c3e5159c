"""What a newcomer gets wrong: one line that says what is wrong and what to do."""

import pytest
from probe_guest import HANDLERS
from recorded_session import reply, session, trap, write_file

from vmibridge.cli import main

RUN = ["run", "--handlers", "probe.py", "--backend"]
EMPTY = "a source of handlers is empty: name a Python file, a folder or a dotted module"
NONE = "no source of handlers is given: name a Python file, a folder or a dotted module"
NO_HANDLER = "bare: there is no handler in it, as no file there is a *.py whose name"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("probe.py", "bare/_hidden.py", "guest.bin", "empty.bin", "binary.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\nkey = \xff" if name == "binary.toml" else b"")
    (tmp_path / "probe.py").write_text(HANDLERS)
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    write_file(tmp_path / "run.mcap", [(1, session()), (2, trap(1)), (3, reply(1))])

    def run(*words):
        status = main([*words])
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--backend", "unicorn:guest.bin", "--handlers"],
        ["replay", "run.mcap", "--handlers"],
        ["serve", "--listen", "unix:x.sock", "--handlers"],
        ["handlers", "list"],
    ],
    ids=" ".join,
)
class TestHandlers:
    def test_an_empty_source(self, run, command):
        assert run(*command, "") == (2, [f"vmibridge: {EMPTY}"])

    def test_a_folder_without_any(self, run, command):
        status, (line,) = run(*command, "bare")
        assert status == 2
        assert line.startswith(f"vmibridge: {NO_HANDLER}")

    def test_no_source(self, run, command):
        status, (line,) = run(*command)
        assert (status, line) in [
            (2, f"vmibridge: {NONE}"),
            (2, "vmibridge: SOURCES is missing; see 'vmibridge handlers list --help'"),
        ]


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ([*RUN, "unicorn:empty.bin"], 2, "unicorn:empty.bin: is empty, and no image"),
        ([*RUN, "unicorn:bare"], 2, "unicorn:bare: is a folder, and no image"),
        ([*RUN, "unicorn:/dev/null"], 2, "unicorn:/dev/null: is no regular file"),
        ([*RUN, "unicorn:guest.bin", "--timeout", "1s"], 2,
         "--timeout '1s': is no number; see 'vmibridge run --help'"),
        (["inspect", "run.mcap", "--vcpu", "x"], 2,
         "--vcpu 'x': is no whole number; see 'vmibridge inspect --help'"),
        ([*RUN, "guest.bin"], 2, "no backend for 'guest.bin': did you mean unicorn:guest.bin?"),
        ([*RUN, "red=guest.bin"], 2, "no backend for 'guest.bin': did you mean unicorn:guest.bin?"),
        ([*RUN, "run.mcap"], 2, "no backend for 'run.mcap': did you mean replay:run.mcap?"),
        ([*RUN, "unicron:x"], 2, "no backend for 'unicron:x': did you mean unicorn:...?"),
        ([*RUN, "unicorn:guest.bin", "--config", "binary.toml"], 2,
         "binary.toml:2: is not text in UTF-8"),
        (["qemu", "build-plugin", "--foo"], 2,
         "Unknown option: --foo; see 'vmibridge qemu build-plugin --help'"),
        (["recordings", "get"], 2, "NAME is missing; see 'vmibridge recordings get --help'"),
        (["edit", "run.mcap"], 2, "--output is missing; see 'vmibridge edit --help'"),
        (["inspect", "run.mcap", "b"], 2,
         "there is no place for 'b'; see 'vmibridge inspect --help'"),
        ([*RUN, "unicorn:guest.bin", "--record", "none/x"], 1, "none/x: there is no folder none"),
        (["export", "run.mcap", "--to", "jsonl", "-o", "none/x"], 1,
         "none/x: there is no folder none"),
        (["edit", "run.mcap", "-o", "none/x"], 1, "none/x: there is no folder none"),
        (["report", "run.mcap", "-o", "none/x"], 1, "none/x: there is no folder none"),
        (["replay", "run.mcap", "--handlers", "probe.py", "--accept", "-o", "none/x"], 2,
         "none/x: there is no folder none"),
        (["replay", "run.mcap", "--handlers", "probe.py", "--junit", "none/x"], 2,
         "none/x: there is no folder none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_one_line_and_a_status(run, words, status, line):
    assert run(*words) == (status, [f"vmibridge: {line}"])


def test_recover_of_a_recording_without_traps_says_so(run, tmp_path, capsys):
    write_file(tmp_path / "bare.mcap", [(1, session())])
    assert main(["recover", "bare.mcap", "-o", "clean.mcap"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean.mcap: 1 session, no trap kept"


@pytest.mark.parametrize("file", ["none.mcap", "probe.py"])
@pytest.mark.parametrize("options", ["", "?copies=2"])
def test_a_recording_that_is_none_is_one_line_wherever_it_is_a_guest(run, file, options):
    backend = f"replay:{file}{options}"
    for command in (
        ["run", "--handlers", "probe.py", "--backend", backend],
        ["agent", "--connect", "unix:none.sock", "--backend", backend],
    ):
        status, lines = run(*command)
        assert (status, len(lines)) == (2, 1), lines
        assert lines[0].startswith(f"vmibridge: {file}: ")
