"""A selection that takes nothing: one line on standard error, the same of each command."""

import pytest
from probe_guest import HANDLERS
from recorded_session import reply, session, trap, write_file

from vmibridge.cli import main

LINE = (
    "run.mcap: no trap matches request 0x0999, VM gone; there are requests 0x0001 (probe); VMs vm"
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.py").write_text(HANDLERS)
    write_file(tmp_path / "run.mcap", [(1, session()), (2, trap(1)), (3, reply(1))])

    def run(*words):
        status = main([*words, "--request", "0x999", "--vm", "gone"])
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["inspect", "run.mcap"], 0, LINE),
        (["inspect", "run.mcap", "--json"], 0, LINE),
        (["export", "run.mcap", "--to", "jsonl", "-o", "-"], 0, LINE),
        (["edit", "run.mcap", "-o", "part.mcap"], 2, f"{LINE}; nothing was written"),
        (["replay", "run.mcap", "--handlers", "probe.py"], 2, LINE),
        (["replay", "run.mcap", "--handlers", "probe.py", "--json"], 2, LINE),
        (["diff", "run.mcap", "run.mcap"], 2, f"nothing was compared: {LINE}"),
    ],
    ids=str,
)
def test_is_told_alike(run, words, status, line):
    assert run(*words) == (status, [f"vmibridge: {line}"])


def test_is_told_of_a_file_that_was_made_without_traps(run, tmp_path):
    status, told = run("export", "run.mcap", "--to", "jsonl")
    assert (status, told) == (0, ["0 traps to run.jsonl", f"vmibridge: {LINE}"])
    assert "seq" not in (tmp_path / "run.jsonl").read_text()
